//! Parquet: the rows of one column, read row group by row group without arrow.

use std::fs::File;
use std::path::Path;

use parquet::basic::Type;
use parquet::column::reader::{ColumnReader, ColumnReaderImpl};
use parquet::data_type::ByteArrayType;
use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::schema::types::ColumnDescriptor;

use super::Visitor;
use crate::data::DataError;

/// Rows in memory at a time.
const ROWS: usize = 128;

/// Visits the texts of `column`; nulls count as blank documents.
pub(super) fn visit(path: &Path, column: &str, visit: &mut Visitor<'_>) -> Result<(), DataError> {
    let file = File::open(path).map_err(|error| DataError::unreadable(path, error))?;
    let undecodable = |error: ParquetError| undecodable(path, None, &error);
    let reader = SerializedFileReader::new(file).map_err(undecodable)?;
    let columns = reader.metadata().file_metadata().schema_descr_ptr();
    let is_text = |c: &ColumnDescriptor| c.physical_type() == Type::BYTE_ARRAY && c.max_rep_level() == 0;
    let index = columns.columns().iter().position(|c| c.path().string() == column && is_text(c));
    let Some(index) = index else {
        let found = columns.columns().iter().filter(|c| is_text(c)).map(|c| c.path().string()).collect();
        return Err(DataError::MissingColumn { path: path.to_path_buf(), column: column.to_string(), found });
    };
    let mut row = 0;
    for group in 0..reader.num_row_groups() {
        let group = reader.get_row_group(group).map_err(undecodable)?;
        if let ColumnReader::ByteArrayColumnReader(texts) = group.get_column_reader(index).map_err(undecodable)? {
            visit_group(path, texts, columns.column(index).max_def_level(), &mut row, visit)?;
        }
    }
    Ok(())
}

fn visit_group(
    path: &Path,
    mut reader: ColumnReaderImpl<ByteArrayType>,
    present: i16,
    row: &mut u64,
    visit: &mut Visitor<'_>,
) -> Result<(), DataError> {
    let (mut texts, mut levels) = (Vec::with_capacity(ROWS), Vec::with_capacity(ROWS));
    loop {
        texts.clear();
        levels.clear();
        let read = reader.read_records(ROWS, Some(&mut levels), None, &mut texts);
        let (rows, _, _) = read.map_err(|error| undecodable(path, Some(*row + 1), &error))?;
        if rows == 0 {
            return Ok(());
        }
        let mut values = texts.iter();
        for index in 0..rows {
            *row += 1;
            let is_null = present > 0 && levels.get(index) != Some(&present);
            let bytes = if is_null { &[][..] } else { values.next().map_or(&[][..], |value| value.data()) };
            visit(std::str::from_utf8(bytes).map_err(|error| undecodable(path, Some(*row), &error))?)?;
        }
    }
}

fn undecodable(path: &Path, row: Option<u64>, error: &dyn std::fmt::Display) -> DataError {
    DataError::Parquet { path: path.to_path_buf(), row, reason: error.to_string() }
}
