//! JSON lines: one object a line, of which one field is a document. Other fields are skipped without
//! being built, and a text without escapes is borrowed from the line.

use std::borrow::Cow;
use std::fmt;
use std::io::BufRead;
use std::path::Path;

use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, Visitor as Visit};

use super::Visitor;
use crate::data::DataError;

/// Visits the text of each line that `lines` holds; blank lines and null texts count as blank documents.
pub(super) fn visit(
    path: &Path,
    mut lines: Box<dyn BufRead>,
    field: &str,
    visit: &mut Visitor<'_>,
) -> Result<(), DataError> {
    let mut bytes = Vec::new();
    for line in 1.. {
        bytes.clear();
        let read = lines.read_until(b'\n', &mut bytes).map_err(|error| DataError::unreadable(path, error))?;
        if read == 0 {
            break;
        }
        let content = bytes.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(&bytes).trim_ascii();
        if content.is_empty() {
            continue;
        }
        match pick(content, field) {
            Ok(Some(text)) => visit(text.as_deref().unwrap_or(""))?,
            Ok(None) => return Err(missing(path, line, field, content)),
            Err(error) => return Err(malformed(path, line, &error)),
        }
    }
    Ok(())
}

/// The field's text: `None` if there is no such field, `Some(None)` if it is null.
fn pick<'a>(json: &'a [u8], field: &str) -> Result<Option<Option<Cow<'a, str>>>, serde_json::Error> {
    let mut deserializer = serde_json::Deserializer::from_slice(json);
    let text = Pick(field).deserialize(&mut deserializer)?;
    deserializer.end().map(|()| text)
}

fn malformed(path: &Path, line: u64, error: &serde_json::Error) -> DataError {
    let message = error.to_string();
    let reason = message.rsplit_once(" at line ").map_or(message.as_str(), |(reason, _)| reason);
    let reason = format!("{reason} at column {}", error.column());
    DataError::MalformedJson { path: path.to_path_buf(), line, reason }
}

fn missing(path: &Path, line: u64, field: &str, json: &[u8]) -> DataError {
    let object: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(json).unwrap_or_default();
    let found = object.keys().take(20).cloned().collect();
    DataError::MissingField { path: path.to_path_buf(), line, field: field.to_string(), found }
}

struct Pick<'f>(&'f str);

#[derive(Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

impl<'de> DeserializeSeed<'de> for Pick<'_> {
    type Value = Option<Option<Cow<'de, str>>>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visit<'de> for Pick<'_> {
    type Value = Option<Option<Cow<'de, str>>>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a JSON object with the field '{}'", self.0)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut found = None;
        while let Some(key) = map.next_key::<Text<'de>>()? {
            if key.0 == self.0 {
                found = Some(map.next_value::<Option<Text<'de>>>()?.map(|text| text.0));
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(found)
    }
}
