use std::fs;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use parquet::basic::{Compression, ZstdLevel};
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;

use super::*;

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

fn write(folder: &Path, name: &str, bytes: impl AsRef<[u8]>) {
    let path = folder.join(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, bytes).unwrap();
}

fn read_field(path: &Path, field: &str) -> Result<(Vec<String>, Skipped), DataError> {
    let mut documents = Vec::new();
    let skipped = Source::open(path)?.visit(&TextField(field.to_string()), &mut |document| {
        documents.push(document.text.to_string());
        Ok(())
    })?;
    Ok((documents, skipped))
}

fn read(path: &Path) -> Vec<String> {
    read_field(path, "text").unwrap().0
}

/// The error's sentence with the folder's name taken out.
fn error(folder: &Path, name: &str, field: &str) -> String {
    let error = read_field(&folder.join(name), field).unwrap_err().to_string();
    error.replace(&format!("{}/", folder.display()), "")
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn zst(bytes: &[u8]) -> Vec<u8> {
    zstd::stream::encode_all(bytes, 1).unwrap()
}

/// A parquet file with an integer and a nullable text column, two rows to a group.
fn parquet(path: &Path, compression: Compression, texts: &[Option<&str>]) {
    let schema = "message m { REQUIRED INT64 id; OPTIONAL BYTE_ARRAY body (UTF8); REQUIRED BYTE_ARRAY text (UTF8); }";
    let schema = Arc::new(parse_message_type(schema).unwrap());
    let properties = WriterProperties::builder().set_compression(compression).build();
    let mut writer = SerializedFileWriter::new(fs::File::create(path).unwrap(), schema, Arc::new(properties)).unwrap();
    for rows in texts.chunks(2) {
        let mut group = writer.next_row_group().unwrap();
        let mut column = group.next_column().unwrap().unwrap();
        let ids: Vec<i64> = (0..rows.len() as i64).collect();
        column.typed::<parquet::data_type::Int64Type>().write_batch(&ids, None, None).unwrap();
        column.close().unwrap();
        let bodies: Vec<ByteArray> = rows.iter().flatten().map(|&text| ByteArray::from(text)).collect();
        let levels: Vec<i16> = rows.iter().map(|row| i16::from(row.is_some())).collect();
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<ByteArrayType>().write_batch(&bodies, Some(&levels), None).unwrap();
        column.close().unwrap();
        let upper = |row: &Option<&str>| ByteArray::from(row.unwrap_or("null").to_uppercase().as_str());
        let texts: Vec<ByteArray> = rows.iter().map(upper).collect();
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<ByteArrayType>().write_batch(&texts, None, None).unwrap();
        column.close().unwrap();
        group.close().unwrap();
    }
    writer.close().unwrap();
}

#[test]
fn a_folder_is_read_in_the_order_of_names() {
    let folder = folder();
    write(folder.path(), "b.md", "b");
    write(folder.path(), "a/z.rs", "a/z");
    write(folder.path(), "a.txt", "a");
    write(folder.path(), "a/b/c.py", "a/b/c");
    for skipped in [".git/x.md", "target/x.rs", "x.png", "Makefile", ".x.md"] {
        write(folder.path(), skipped, "not read");
    }
    assert_eq!(read(folder.path()), ["a", "a/b/c", "a/z", "b"]);
    let source = Source::open(folder.path()).unwrap();
    assert_eq!((source.files(), source.bytes()), (4, 10));
}

#[test]
fn the_signature_sees_every_change() {
    let folder = folder();
    write(folder.path(), "a.txt", "a");
    let signature = || Source::open(folder.path()).unwrap().signature();
    let first = signature();
    assert_eq!(first, signature());
    write(folder.path(), "b.txt", "");
    let second = signature();
    fs::rename(folder.path().join("b.txt"), folder.path().join("c.txt")).unwrap();
    let third = signature();
    write(folder.path(), "c.txt", "c");
    assert!(first != second && second != third && third != signature());
}

#[test]
fn json_lines_come_plain_gzipped_and_zstandard() {
    let folder = folder();
    let lines = "{\"id\": 1, \"text\": \"one\"}\n\n{\"text\":\"t\\u00e9\\n\",\"meta\":{\"text\":\"no\"}}\r\n{\"text\": null}\n{\"text\":\"last\"}";
    // Two frames, as appending to a compressed file makes them.
    let two = |pack: fn(&[u8]) -> Vec<u8>| [pack(&lines.as_bytes()[..30]), pack(&lines.as_bytes()[30..])].concat();
    let files = [
        ("a.jsonl", lines.as_bytes().to_vec()),
        ("b.jsonl.gz", two(gzip)),
        ("c.jsonl.zst", two(zst)),
        ("d.json", zst(b"")),
    ];
    for (name, bytes) in &files[..3] {
        write(folder.path(), name, bytes);
        let (documents, skipped) = read_field(&folder.path().join(name), "text").unwrap();
        assert_eq!(documents, ["one", "té\n", "last"], "{name}");
        assert_eq!(skipped, Skipped { not_utf8: 0, blank: 1 });
    }
    write(folder.path(), "e.json", "\u{feff}{\"body\": \"x\"}");
    assert_eq!(read_field(&folder.path().join("e.json"), "body").unwrap().0, ["x"]);
    write(folder.path(), "f.txt.gz", gzip(b"packed text"));
    assert_eq!(read(&folder.path().join("f.txt.gz")), ["packed text"]);
}

#[test]
fn parquet_is_read_with_each_compression() {
    let folder = folder();
    let texts = [Some("one"), None, Some("three"), Some("é"), Some("")];
    let level = ZstdLevel::try_new(3).unwrap();
    for compression in [Compression::UNCOMPRESSED, Compression::SNAPPY, Compression::ZSTD(level)] {
        let path = folder.path().join("a.parquet");
        parquet(&path, compression, &texts);
        assert_eq!(read(&path), ["ONE", "NULL", "THREE", "É"]);
        let (documents, skipped) = read_field(&path, "body").unwrap();
        assert_eq!((documents, skipped.blank), (["one", "three", "é"].map(String::from).to_vec(), 2));
    }
}

#[test]
fn a_file_that_is_not_utf8_is_skipped_and_counted() {
    let folder = folder();
    write(folder.path(), "a.txt", b"\xff\xfe");
    write(folder.path(), "b.txt", "fine");
    let (documents, skipped) = read_field(folder.path(), "text").unwrap();
    assert_eq!((documents, skipped.not_utf8), (vec!["fine".to_string()], 1));
    assert_eq!(skipped.to_string(), " (files that are not UTF-8: 1)");
    write(folder.path(), "LICENSE", "a named file is read whatever its name");
    assert_eq!(read(&folder.path().join("LICENSE")).len(), 1);
}

#[test]
fn every_failure_has_its_own_sentence() {
    let folder = folder();
    let at = |name: &str| error(folder.path(), name, "text");
    assert_eq!(
        Source::open(Path::new("")).unwrap_err().to_string(),
        "the path of the data is empty\nhint: give a file or a folder, such as --data books/"
    );
    assert!(
        at("nothing.txt").starts_with("there is no nothing.txt\nhint: check the spelling; a relative path starts at ")
    );
    write(folder.path(), "empty/x.png", "");
    assert!(at("empty").starts_with("found no document in empty\nhint: Atoll reads .txt, .md"), "{}", at("empty"));
    write(folder.path(), "bad.jsonl", "{\"text\": \"x\"}\n{\"text\": \"y\"\n");
    assert_eq!(
        at("bad.jsonl"),
        "bad.jsonl, line 2: EOF while parsing an object at column 12\nhint: each line must be one JSON object, such as {\"text\": \"...\"}"
    );
    write(folder.path(), "list.json", "[1,\n2]");
    assert!(at("list.json").starts_with("list.json, line 1: invalid type: sequence, expected a JSON object"));
    write(folder.path(), "other.jsonl", "{\"title\": 1, \"body\": \"x\"}\n");
    assert_eq!(
        at("other.jsonl"),
        "other.jsonl, line 1: there is no field 'text'\nhint: this line has body, title; name the one with the text by --text-field"
    );
    assert!(error(folder.path(), "other.jsonl", "title").starts_with("other.jsonl, line 1: invalid type: integer `1`"));
    parquet(&folder.path().join("a.parquet"), Compression::SNAPPY, &[Some("x")]);
    assert_eq!(
        error(folder.path(), "a.parquet", "content"),
        "a.parquet has no column 'content' of text\nhint: it has body, text; name the one with the text by --text-field"
    );
    write(folder.path(), "b.parquet", "no parquet at all");
    assert!(
        at("b.parquet").starts_with("b.parquet: ")
            && at("b.parquet").contains("\nhint: check that the file is complete")
    );
    let whole = zst(&b"{\"text\": \"0123456789\"}\n".repeat(9000));
    write(folder.path(), "cut.jsonl.zst", &whole[..whole.len() - 4]);
    assert!(at("cut.jsonl.zst").starts_with("cannot read cut.jsonl.zst: "), "{}", at("cut.jsonl.zst"));
    assert!(at("cut.jsonl.zst").contains("\nhint: check its permissions, and that it was copied completely"));
    write(folder.path(), "no.txt.gz", "not gzip");
    assert!(at("no.txt.gz").starts_with("cannot read no.txt.gz: "));
}

#[cfg(unix)]
#[test]
fn links_to_files_are_followed_and_a_broken_one_is_named() {
    let folder = folder();
    write(folder.path(), "blobs/1", "linked");
    std::os::unix::fs::symlink("blobs/1", folder.path().join("a.txt")).unwrap();
    assert_eq!(read(folder.path()), ["linked"]);
    std::os::unix::fs::symlink("blobs/2", folder.path().join("b.txt")).unwrap();
    assert!(read_field(folder.path(), "text").unwrap_err().to_string().contains("b.txt"));
}
