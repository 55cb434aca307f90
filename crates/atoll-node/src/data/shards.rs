//! Tokens on disk. A shard is a header and tokens, little endian throughout, written once and then
//! only mapped:
//!
//! ```text
//!   0        8        12       16               48        56        64
//!   ┌────────┬────────┬────────┬────────────────┬─────────┬─────────┬──────────────────────┐
//!   │ magic  │version │ width  │ tokenizer hash │ tokens  │documents│ tokens, width bytes  │
//!   │ATOLLTOK│ u32 = 1│u32 2, 4│ 32 bytes       │ u64     │ u64     │ each                 │
//!   └────────┴────────┴────────┴────────────────┴─────────┴─────────┴──────────────────────┘
//! ```
//!
//! Tokens have 2 bytes if the vocabulary has at most 65,536 of them, else 4. A shard has at most
//! 64 MiB; a document may cross into the next shard and is counted in the one where it ends. The
//! dataset names each shard by the BLAKE3 hash of all its bytes, and opening verifies it (some GB/s).

use std::path::{Path, PathBuf};

use atoll_core::hash::Digest;
use serde::{Deserialize, Serialize};

use crate::data::map::Map;
use crate::data::{DataError, file};

/// The largest size of a shard.
pub const SHARD_BYTES_MAX: usize = 64 << 20;

const MAGIC: [u8; 8] = *b"ATOLLTOK";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 64;

/// What a dataset knows of one of its shards.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShardInfo {
    /// The file's name in the dataset's folder.
    pub file: String,
    /// BLAKE3 of the file.
    pub hash: Digest,
    /// Tokens, ends of text included.
    pub tokens: u64,
    /// Documents that end in this shard.
    pub documents: u64,
    /// Bytes of these documents' text.
    pub text_bytes: u64,
}

/// Bytes per token for a vocabulary of that size.
fn width(vocab_size: usize) -> usize {
    if vocab_size <= 1 << 16 { 2 } else { 4 }
}

/// Writes one split's tokens shard by shard. Memory holds one shard.
#[derive(Debug)]
pub(crate) struct ShardWriter {
    folder: PathBuf,
    /// The first part of the shards' names.
    name: &'static str,
    tokenizer: Digest,
    width: usize,
    bytes_max: usize,
    /// The shard being filled, its header still blank.
    bytes: Vec<u8>,
    documents: u64,
    text_bytes: u64,
    written: Vec<ShardInfo>,
}

impl ShardWriter {
    pub(crate) fn new(folder: &Path, name: &'static str, tokenizer: Digest, vocab_size: usize, bytes: usize) -> Self {
        let bytes_max = bytes.clamp(HEADER_BYTES + 4, SHARD_BYTES_MAX);
        Self {
            folder: folder.to_path_buf(),
            name,
            tokenizer,
            width: width(vocab_size),
            bytes_max,
            bytes: vec![0; HEADER_BYTES],
            documents: 0,
            text_bytes: 0,
            written: Vec::new(),
        }
    }

    /// Appends the tokens of a document whose text has `text_bytes`.
    pub(crate) fn push(&mut self, tokens: &[u32], text_bytes: u64) -> Result<(), DataError> {
        for &token in tokens {
            if self.bytes.len() + self.width > self.bytes_max {
                self.write_shard()?;
            }
            self.bytes.extend_from_slice(&token.to_le_bytes()[..self.width]);
        }
        self.documents += 1;
        self.text_bytes += text_bytes;
        Ok(())
    }

    /// Writes what is left and returns all shards.
    pub(crate) fn finish(mut self) -> Result<Vec<ShardInfo>, DataError> {
        if self.bytes.len() > HEADER_BYTES {
            self.write_shard()?;
        }
        Ok(self.written)
    }

    fn write_shard(&mut self) -> Result<(), DataError> {
        let tokens = ((self.bytes.len() - HEADER_BYTES) / self.width) as u64;
        let header = header(self.width, self.tokenizer, tokens, self.documents);
        self.bytes[..HEADER_BYTES].copy_from_slice(&header);
        let name = format!("{}-{:05}.tokens", self.name, self.written.len());
        let path = self.folder.join(&name);
        file::write(&path, &self.bytes).map_err(|error| DataError::unwritable(&path, error))?;
        self.written.push(ShardInfo {
            file: name,
            hash: Digest::of(&self.bytes),
            tokens,
            documents: std::mem::take(&mut self.documents),
            text_bytes: std::mem::take(&mut self.text_bytes),
        });
        self.bytes.truncate(HEADER_BYTES);
        Ok(())
    }
}

fn header(width: usize, tokenizer: Digest, tokens: u64, documents: u64) -> [u8; HEADER_BYTES] {
    let mut header = [0; HEADER_BYTES];
    header[..8].copy_from_slice(&MAGIC);
    header[8..12].copy_from_slice(&VERSION.to_le_bytes());
    header[12..16].copy_from_slice(&(width as u32).to_le_bytes());
    header[16..48].copy_from_slice(&tokenizer.0);
    header[48..56].copy_from_slice(&tokens.to_le_bytes());
    header[56..].copy_from_slice(&documents.to_le_bytes());
    header
}

/// A verified shard.
#[derive(Debug)]
pub(crate) struct Shard {
    map: Map,
    width: usize,
}

impl Shard {
    /// Maps the shard that `info` describes and verifies every byte of it.
    pub(crate) fn open(folder: &Path, info: &ShardInfo, tokenizer: Digest) -> Result<Self, DataError> {
        let path = folder.join(&info.file);
        let damaged = |reason: String| DataError::DamagedShard { path: path.clone(), reason };
        let map = Map::open(&path).map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => damaged("the file is missing".to_string()),
            _ => DataError::unreadable(&path, error),
        })?;
        let width = map.get(12).map_or(0, |&width| usize::from(width));
        let expected = info.tokens.saturating_mul(width as u64).saturating_add(HEADER_BYTES as u64);
        if map.len() < HEADER_BYTES || map.starts_with(&MAGIC) && (map.len() as u64) < expected {
            return Err(damaged(format!("it ends after {} bytes of {expected}", map.len())));
        }
        if Digest::of(&map) != info.hash {
            return Err(damaged("its bytes do not match its BLAKE3 hash".to_string()));
        }
        let is_known = (width == 2 || width == 4) && map.len() as u64 == expected;
        if !is_known || map[..HEADER_BYTES] != header(width, tokenizer, info.tokens, info.documents) {
            return Err(damaged("its header contradicts dataset.json".to_string()));
        }
        Ok(Self { map, width })
    }

    /// Number of tokens.
    pub(crate) fn len(&self) -> u64 {
        ((self.map.len() - HEADER_BYTES) / self.width) as u64
    }

    /// Appends the tokens from `start` to `end` ≤ [`len`](Self::len).
    pub(crate) fn read(&self, start: u64, end: u64, tokens: &mut Vec<u32>) {
        let place = |index: u64| HEADER_BYTES + index as usize * self.width;
        let bytes = &self.map[place(start)..place(end)];
        match self.width {
            2 => tokens.extend(bytes.chunks_exact(2).map(|b| u32::from(u16::from_le_bytes([b[0], b[1]])))),
            _ => tokens.extend(bytes.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn write(folder: &Path, vocab_size: usize, bytes: usize) -> Vec<ShardInfo> {
        let mut writer = ShardWriter::new(folder, "train", Digest([7; 32]), vocab_size, bytes);
        writer.push(&[1, 2, 3], 10).unwrap();
        writer.push(&[4, 0x1234], 5).unwrap();
        writer.finish().unwrap()
    }

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    #[test]
    fn the_bytes_are_those_of_the_picture() {
        let folder = tempfile::tempdir().unwrap();
        let head = |width: &str, tokens: &str| {
            format!("41544f4c4c544f4b{}{width}{}{tokens}{}", "01000000", "07".repeat(32), "0200000000000000")
        };
        let shards = write(folder.path(), 65_536, SHARD_BYTES_MAX);
        let bytes = fs::read(folder.path().join("train-00000.tokens")).unwrap();
        assert_eq!(hex(&bytes), head("02000000", "0500000000000000") + "01000200030004003412");
        assert_eq!(shards[0].hash, Digest::of(&bytes));
        assert_eq!((shards[0].tokens, shards[0].documents, shards[0].text_bytes), (5, 2, 15));

        write(folder.path(), 65_537, SHARD_BYTES_MAX);
        let bytes = fs::read(folder.path().join("train-00000.tokens")).unwrap();
        let tokens = "0100000002000000030000000400000034120000";
        assert_eq!(hex(&bytes), head("04000000", "0500000000000000") + tokens);
    }

    #[test]
    fn a_full_shard_begins_the_next_one() {
        let folder = tempfile::tempdir().unwrap();
        let shards = write(folder.path(), 70_000, HEADER_BYTES + 2 * 4);
        let counts: Vec<_> = shards.iter().map(|s| (s.tokens, s.documents, s.text_bytes)).collect();
        assert_eq!(counts, [(2, 0, 0), (2, 1, 10), (1, 1, 5)]);
        let mut tokens = Vec::new();
        for info in &shards {
            let shard = Shard::open(folder.path(), info, Digest([7; 32])).unwrap();
            shard.read(0, shard.len(), &mut tokens);
        }
        assert_eq!(tokens, [1, 2, 3, 4, 0x1234]);
    }

    #[test]
    fn every_damage_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let info = write(folder.path(), 256, SHARD_BYTES_MAX).remove(0);
        let path = folder.path().join(&info.file);
        let whole = fs::read(&path).unwrap();
        let reason = |bytes: &[u8], tokenizer| {
            fs::write(&path, bytes).unwrap();
            let error = Shard::open(folder.path(), &info, tokenizer).unwrap_err();
            let text = error.to_string();
            assert!(text.contains("train-00000.tokens") && text.contains("\nhint: delete this folder"), "{text}");
            match error {
                DataError::DamagedShard { reason, .. } => reason,
                other => panic!("{other}"),
            }
        };
        let ours = Digest([7; 32]);
        assert_eq!(reason(&whole[..70], ours), "it ends after 70 bytes of 74");
        assert_eq!(reason(&whole[..7], ours), "it ends after 7 bytes of 64");
        assert_eq!(reason(b"", ours), "it ends after 0 bytes of 64");
        let mut flipped = whole.clone();
        flipped[70] ^= 1;
        assert_eq!(reason(&flipped, ours), "its bytes do not match its BLAKE3 hash");
        assert_eq!(reason(&whole, Digest([8; 32])), "its header contradicts dataset.json");
        fs::remove_file(&path).unwrap();
        let error = Shard::open(folder.path(), &info, ours).unwrap_err().to_string();
        assert!(error.contains("the file is missing"), "{error}");
    }
}
