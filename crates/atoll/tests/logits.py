"""Logits of an exported model for the tokens on standard input, as JSON: python logits.py FOLDER"""

import json
import sys

import torch
from transformers import AutoModelForCausalLM

tokens = torch.tensor([json.load(sys.stdin)])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
with torch.no_grad():
    print(json.dumps(model(tokens).logits.flatten().tolist()))
