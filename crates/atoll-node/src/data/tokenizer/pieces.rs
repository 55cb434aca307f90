//! What tokens stand for, and where a text may be cut without changing its tokens.

use tokenizers::Tokenizer;

use crate::data::DataError;

/// Whether the tokenizer of that `tokenizer.json` maps each byte to one character, as GPT-2's does.
pub(super) fn is_byte_level(json: &[u8]) -> bool {
    let json: serde_json::Value = serde_json::from_slice(json).unwrap_or_default();
    let decoder = &json["decoder"];
    let is = |decoder: &serde_json::Value| decoder["type"] == "ByteLevel";
    is(decoder) || decoder["decoders"].as_array().is_some_and(|parts| parts.iter().any(is))
}

/// Whether that `tokenizer.json` treats the start of a text like any other place.
pub(super) fn may_cut(json: &[u8]) -> bool {
    let json: serde_json::Value = serde_json::from_slice(json).unwrap_or_default();
    let normalizer = &json["normalizer"];
    let is_local = normalizer.is_null() || normalizer["type"] == "NFC";
    is_local && !json["pre_tokenizer"].to_string().contains("\"add_prefix_space\":true")
}

/// More tokens than any model has.
const TOKENS_MAX: u32 = 1 << 24;

/// The bytes of text that each token stands for. Special tokens stand for none.
///
/// # Errors
/// If a token's number is out of all proportion.
pub(super) fn token_bytes(tokenizer: &Tokenizer, is_byte_level: bool, end_of_text: u32) -> Result<Vec<u32>, DataError> {
    let (vocabulary, added) = (tokenizer.get_vocab(true), tokenizer.get_added_tokens_decoder());
    let last = vocabulary.values().chain(added.keys()).max().copied().unwrap_or(0);
    if last >= TOKENS_MAX {
        return Err(DataError::bad_tokenizer(format!("it has a token number {last}, and {TOKENS_MAX} is too high")));
    }
    let mut bytes = vec![0; last as usize + 1];
    let anchor = vocabulary.get("a").copied();
    for (token, &id) in &vocabulary {
        let len = if is_byte_level { bytes_of_characters(token) } else { decoded_len(tokenizer, anchor, token, id) };
        bytes[id as usize] = len as u32;
    }
    for (&id, added) in &added {
        bytes[id as usize] = if added.special { 0 } else { added.content.len() as u32 };
    }
    bytes[end_of_text as usize] = 0;
    Ok(bytes)
}

/// A byte-level token has one character per byte: the printable ones of Latin-1 are themselves, the
/// other 68 bytes are the characters from U+0100.
fn bytes_of_characters(token: &str) -> usize {
    let is_byte = |c: char| matches!(c, '!'..='~' | '¡'..='¬' | '®'..='ÿ' | '\u{100}'..='\u{143}');
    if token.chars().all(is_byte) { token.chars().count() } else { token.len() }
}

/// By how much a token lengthens a text. It is decoded behind another token, since decoders drop the
/// space at the start of a text.
fn decoded_len(tokenizer: &Tokenizer, anchor: Option<u32>, token: &str, id: u32) -> usize {
    let is_one_byte = token.len() == 6 && token.starts_with("<0x") && token.ends_with('>');
    if is_one_byte {
        return 1;
    }
    let len = |ids: &[u32]| tokenizer.decode(ids, false).map_or(0, |text| text.len());
    match anchor {
        Some(anchor) => len(&[anchor, id]).saturating_sub(len(&[anchor])),
        None => len(&[id]),
    }
}

/// Cuts `text` into pieces of at least `piece_bytes`, each cut before a line feed that follows a letter
/// or digit: all byte-level pre-tokenizers separate the two, so the tokens are those of the whole.
pub(super) fn cut(text: &str, piece_bytes: usize) -> Vec<&str> {
    let mut pieces = Vec::with_capacity(text.len() / piece_bytes + 1);
    let mut rest = text;
    while let Some(place) = first_cut(rest.as_bytes(), piece_bytes) {
        let (piece, after) = rest.split_at(place);
        pieces.push(piece);
        rest = after;
    }
    pieces.push(rest);
    pieces
}

fn first_cut(text: &[u8], from: usize) -> Option<usize> {
    let is_cut = |pair: &[u8]| pair[0].is_ascii_alphanumeric() && pair[1] == b'\n';
    text.get(from..)?.windows(2).position(is_cut).map(|place| from + place + 1)
}
