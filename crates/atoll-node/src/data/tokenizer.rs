//! Text to tokens and back. A [`Tokenizer`] is a Hugging Face `tokenizer.json`, named by the hash of
//! its exact bytes; all sites of a run use the same. Atoll trains a byte-level BPE where the user
//! brings none: it needs no normalization and no unknown token, so every text comes back unchanged.
//!
//! Special tokens in a text are text: a document that mentions `<|endoftext|>` cannot end itself.
//!
//! Each token stands for some bytes of text ([`Tokenizer::token_bytes`]), from which follow bits per
//! byte, the loss that can be compared between vocabularies: nats ÷ ln 2 ÷ bytes.

mod pieces;
mod sample;

use std::panic::catch_unwind;

use atoll_core::hash::Digest;
use rayon::prelude::*;
use serde::de::IgnoredAny;
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, Tokenizer as HfTokenizer};

use crate::data::DataError;
pub use sample::Sample;

/// Names of a token that ends a document, the first found counts.
pub const END_OF_TEXT: [&str; 5] = ["<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|im_end|>"];

/// The smallest vocabulary of a trained tokenizer: all bytes and the end of text.
pub const VOCABULARY_MIN: usize = 257;

/// A text longer than this is cut before it is encoded, where a cut cannot change the tokens.
const PIECE_BYTES: usize = 8 << 10;

/// A tokenizer and its name.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    inner: HfTokenizer,
    json: Vec<u8>,
    hash: Digest,
    end_of_text: (u32, &'static str),
    /// Bytes of text by token; its length is the size of the vocabulary.
    token_bytes: Vec<u32>,
    /// Whether long texts may be encoded in pieces.
    may_cut: bool,
}

impl Tokenizer {
    /// Reads a `tokenizer.json`.
    ///
    /// # Errors
    /// If it is none, or has no token of [`END_OF_TEXT`].
    pub fn from_bytes(json: impl Into<Vec<u8>>) -> Result<Self, DataError> {
        let json = json.into();
        let mut inner = understand(&json)?;
        inner.with_truncation(None).map_err(DataError::bad_tokenizer)?;
        inner.with_padding(None);
        inner.set_encode_special_tokens(true);
        let named = |&name: &&'static str| inner.token_to_id(name).map(|id| (id, name));
        let end_of_text = END_OF_TEXT.iter().find_map(named).ok_or(DataError::NoEndOfText)?;
        let is_byte_level = pieces::is_byte_level(&json);
        let token_bytes = pieces::token_bytes(&inner, is_byte_level, end_of_text.0)?;
        let may_cut = is_byte_level && pieces::may_cut(&json);
        Ok(Self { hash: Digest::of(&json), inner, json, end_of_text, token_bytes, may_cut })
    }

    /// Trains a byte-level BPE of `vocab_size` tokens, or fewer if the sample has too few pairs to merge.
    ///
    /// # Errors
    /// If `vocab_size` is below [`VOCABULARY_MIN`].
    pub fn train(sample: &Sample, vocab_size: usize) -> Result<Self, DataError> {
        if vocab_size < VOCABULARY_MIN {
            return Err(DataError::SmallVocabulary { wanted: vocab_size });
        }
        let trainer = BpeTrainer::builder()
            .vocab_size(vocab_size)
            .min_frequency(2)
            .show_progress(false)
            .special_tokens(vec![AddedToken::from(END_OF_TEXT[0], true)])
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .build();
        let mut inner = HfTokenizer::new(BPE::default());
        inner.with_pre_tokenizer(Some(ByteLevel::new(false, true, true)));
        inner.with_decoder(Some(ByteLevel::new(false, true, true)));
        let mut trainer = TrainerWrapper::from(trainer);
        inner.train(&mut trainer, sample.pieces()).map_err(DataError::bad_tokenizer)?;
        Self::from_bytes(inner.to_string(false).map_err(DataError::bad_tokenizer)?)
    }

    /// The tokens of `text`, without an end of text. A long text is encoded on several threads.
    ///
    /// # Errors
    /// If the tokenizer has no token for some part of the text; a byte-level one always has.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, DataError> {
        let encode = |piece: &str| -> Result<Vec<u32>, DataError> {
            let encoding = self.inner.encode_fast(piece, false).map_err(DataError::bad_tokenizer)?;
            Ok(encoding.get_ids().to_vec())
        };
        if !self.may_cut || text.len() < 2 * PIECE_BYTES {
            return encode(text);
        }
        let pieces: Result<Vec<_>, _> = pieces::cut(text, PIECE_BYTES).into_par_iter().map(encode).collect();
        Ok(pieces?.concat())
    }

    /// The text of `tokens`, without ends of text. Bytes that are no UTF-8 become `U+FFFD`.
    ///
    /// # Errors
    /// If the tokenizer's decoder refuses.
    pub fn decode(&self, tokens: &[u32]) -> Result<String, DataError> {
        self.inner.decode(tokens, true).map_err(DataError::bad_tokenizer)
    }

    /// One more than the highest token.
    pub fn vocab_size(&self) -> usize {
        self.token_bytes.len()
    }

    /// The token that stands after every document.
    pub fn end_of_text(&self) -> u32 {
        self.end_of_text.0
    }

    /// Its name, one of [`END_OF_TEXT`].
    pub fn end_of_text_name(&self) -> &'static str {
        self.end_of_text.1
    }

    /// How many bytes of text `token` stands for; 0 for the end of text and for unknown tokens.
    pub fn token_bytes(&self, token: u32) -> usize {
        self.token_bytes.get(token as usize).map_or(0, |&bytes| bytes as usize)
    }

    /// Names this tokenizer: the hash of [`json`](Self::json).
    pub fn hash(&self) -> Digest {
        self.hash
    }

    /// The `tokenizer.json`, byte for byte.
    pub fn json(&self) -> &[u8] {
        &self.json
    }
}

/// Asks the library what these bytes say. It panics where it meets some that are no tokenizer, be they no JSON at all or
/// a damaged normalizer; they come over the network, so that must not end a site.
fn understand(json: &[u8]) -> Result<HfTokenizer, DataError> {
    serde_json::from_slice::<IgnoredAny>(json).map_err(DataError::bad_tokenizer)?;
    let read = catch_unwind(|| HfTokenizer::from_bytes(json));
    read.unwrap_or_else(|_| Err("one of its parts is damaged".into())).map_err(DataError::bad_tokenizer)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    const ODD: &str = "naïve — 漢字 🏝️\u{200d} \u{0}\u{7f}\r\n\t  e\u{301} <|endoftext|> ﷽ \u{10ffff}";

    fn english() -> Sample {
        let mut sample = Sample::default();
        for n in 0..400 {
            sample.push(&format!("The site number {n} holds {} leases, and the coordinator knows it.\n", n * 7));
        }
        sample
    }

    fn trained() -> Tokenizer {
        Tokenizer::train(&english(), 320).unwrap()
    }

    #[test]
    fn any_text_comes_back_and_its_bytes_add_up() {
        let tokenizer = trained();
        for text in ["", "The site", ODD, "\u{feff}x", "\n\n\n", &ODD.repeat(50)] {
            let tokens = tokenizer.encode(text).unwrap();
            assert_eq!(tokenizer.decode(&tokens).unwrap(), text);
            assert_eq!(tokens.iter().map(|&t| tokenizer.token_bytes(t)).sum::<usize>(), text.len(), "{text:?}");
            assert!(!tokens.contains(&tokenizer.end_of_text()), "a text cannot end itself");
        }
        assert_eq!(tokenizer.token_bytes(tokenizer.end_of_text()), 0);
    }

    #[test]
    fn training_is_deterministic_and_gives_the_size_asked_for() {
        let (a, b) = (trained(), trained());
        assert_eq!(a.json(), b.json());
        assert_eq!((a.vocab_size(), a.end_of_text(), a.end_of_text_name()), (320, 0, "<|endoftext|>"));
        assert_eq!(a.hash(), Digest::of(a.json()));
        assert_eq!(Tokenizer::from_bytes(a.json()).unwrap().hash(), a.hash());
        assert!(a.encode("The coordinator").unwrap().len() < 8, "merges are used");
    }

    #[test]
    fn long_texts_are_cut_where_it_does_not_show() {
        let tokenizer = trained();
        let text: String = (0..9000).map(|n| format!("line {n} of a long text!  \n\n x{n}\n{ODD}\n")).collect();
        let whole = tokenizer.inner.encode_fast(text.as_str(), false).unwrap();
        assert!(pieces::cut(&text, PIECE_BYTES).len() > 3);
        assert_eq!(tokenizer.encode(&text).unwrap(), whole.get_ids());
    }

    #[test]
    fn a_tokenizer_that_marks_the_start_of_a_text_sees_it_whole() {
        let spaced = edited(|json| json["pre_tokenizer"]["add_prefix_space"] = json!(true)).unwrap();
        let normalized = edited(|json| json["normalizer"] = json!({"type": "Prepend", "prepend": "x"})).unwrap();
        assert!(trained().may_cut && !spaced.may_cut && !normalized.may_cut);
    }

    #[test]
    fn the_sizes_that_cannot_be_are_refused() {
        let error = Tokenizer::train(&english(), 256).unwrap_err().to_string();
        assert_eq!(
            error,
            "a vocabulary of 256 is too small\nhint: a byte-level tokenizer needs at least 257 tokens: 256 bytes and the end of text"
        );
        assert_eq!(Tokenizer::train(&english(), VOCABULARY_MIN).unwrap().vocab_size(), VOCABULARY_MIN);
    }

    fn edited(edit: impl FnOnce(&mut Value)) -> Result<Tokenizer, DataError> {
        let mut json: Value = serde_json::from_slice(trained().json()).unwrap();
        edit(&mut json);
        Tokenizer::from_bytes(json.to_string())
    }

    #[test]
    fn other_names_of_the_end_of_text_are_known() {
        let rename = |name: &'static str| {
            edited(move |json| {
                json["added_tokens"][0]["content"] = json!(name);
                let vocabulary = json["model"]["vocab"].as_object_mut().unwrap();
                vocabulary.remove("<|endoftext|>");
                vocabulary.insert(name.to_string(), json!(0));
            })
        };
        for name in END_OF_TEXT {
            let tokenizer = rename(name).unwrap();
            assert_eq!((tokenizer.end_of_text(), tokenizer.end_of_text_name()), (0, name));
        }
        let error = rename("<pad>").unwrap_err();
        assert_eq!(error, DataError::NoEndOfText);
        assert!(error.to_string().contains("hint: add one of <|endoftext|>, </s>"), "{error}");
        let error = Tokenizer::from_bytes(b"{}".to_vec()).unwrap_err().to_string();
        assert!(error.starts_with("the tokenizer cannot be used: "), "{error}");
    }

    /// Found by fuzzing: the library panics at these.
    #[test]
    fn what_the_library_panics_at_is_refused() {
        let json = String::from_utf8(trained().json().to_vec()).unwrap();
        let (cut, _) = json.split_once("\"decoder\":{\"type").unwrap();
        let charsmap = json!({"type": "Precompiled", "precompiled_charsmap": "AAAA"});
        let broken = [
            Tokenizer::from_bytes(format!("{cut}\"decoder\":{{\"type<")),
            Tokenizer::from_bytes(json.replacen("\"decoder\":{\"type\":", "\"decoder\":{\"type<\",", 1)),
            edited(|json| json["normalizer"] = charsmap),
        ];
        for error in broken.map(Result::unwrap_err) {
            let said = error.to_string();
            assert!(said.starts_with("the tokenizer cannot be used: ") && said.contains("hint: "), "{said}");
        }
    }

    #[test]
    fn no_room_is_made_for_tokens_that_cannot_be() {
        let error = edited(|json| json["model"]["vocab"]["!"] = json!(u32::MAX)).unwrap_err().to_string();
        assert!(error.contains("it has a token number 4294967295, and 16777216 is too high"), "{error}");
    }

    #[test]
    fn a_tokenizer_that_is_not_byte_level_counts_bytes_too() {
        let json = json!({
            "version": "1.0", "truncation": null, "padding": null, "post_processor": null,
            "added_tokens": [{"id": 1, "content": "</s>", "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": true}],
            "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            "pre_tokenizer": null,
            "decoder": {"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"}, {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
            "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": true, "ignore_merges": false,
                "vocab": {"a": 0, "</s>": 1, "▁": 2, "▁a": 3, "<0xC3>": 4, "<0xA9>": 5}, "merges": ["▁ a"]}
        });
        let tokenizer = Tokenizer::from_bytes(json.to_string()).unwrap();
        let tokens = tokenizer.encode("a aé").unwrap();
        assert_eq!(tokens, [0, 3, 4, 5]);
        assert_eq!(tokens.iter().map(|&t| tokenizer.token_bytes(t)).collect::<Vec<_>>(), [1, 2, 1, 1]);
        assert_eq!(tokenizer.token_bytes(1), 0);
    }
}
