"""Batches come from the reader that the native engine uses, and are what is in the shards."""

import atoll
import numpy
import pytest


def test_batches_are_windows_of_the_shards(lab):
    lab = lab(60_000)
    lab.atoll("ingest", lab.text, "--tokenizer", lab.run / "tokenizer.json", "--out", lab.folder / "tokens")
    folder = lab.folder / "tokens"
    batches = atoll.Batches.of_dataset(folder, context=32, seed=1, documents=False)
    first, second = batches.next(4), batches.next(4)
    assert first.tokens.shape == (4, 33) and first.tokens.dtype == numpy.int64 and first.starts is None
    again = atoll.Batches.of_dataset(folder, context=32, seed=1, documents=False).next(8)
    assert numpy.array_equal(numpy.concatenate([first.tokens, second.tokens]), again.tokens)
    packed = atoll.Batches.of_dataset(folder, context=32, seed=1, documents=True).next(8)
    assert numpy.array_equal(packed.tokens, again.tokens) and packed.starts.shape == (8, 32)


def test_more_than_there_is_starves_and_takes_nothing():
    tokens = numpy.arange(12, dtype=numpy.int64).reshape(3, 4)
    batches = atoll.Batches.of([tokens, tokens + 1])
    assert batches.next(3).progress == 0.0 and batches.next(3).progress == 0.5
    with pytest.raises(atoll.Starved):
        batches.next(3)


def test_nonsense_is_no_batch():
    with pytest.raises(atoll.AtollError, match="-1 is no token"):
        atoll.Batches.of([numpy.array([[1, -1]])])
    with pytest.raises(atoll.AtollError, match="nothing to predict"):
        atoll.Batches.of([numpy.array([[1]])])
