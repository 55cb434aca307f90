//! What the codec of the way up has not delivered when a site stops, kept for its next process. The file is used once:
//! a process that dies without writing a new one must not deliver the same residual twice.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use atoll_core::codec::check_finite;
use atoll_core::manifest::Manifest;

use crate::data::file;
use crate::run::write_atomically;

/// The fingerprint of the layout, then the residuals of all fragments as little-endian `f32`.
fn path(dir: &Path) -> PathBuf {
    dir.join("residuals")
}

/// Keeps residuals for the next process.
///
/// # Errors
/// If the disk does not take them.
pub(super) fn keep(dir: &Path, manifest: &Manifest, residuals: &[Vec<f32>]) -> Result<()> {
    if residuals.iter().flatten().all(|rest| *rest == 0.0) {
        return Ok(());
    }
    let values = residuals.iter().flatten().flat_map(|rest| rest.to_le_bytes());
    let bytes: Vec<u8> = manifest.fingerprint().0.into_iter().chain(values).collect();
    write_atomically(&path(dir), &bytes)
}

/// Takes the residuals of the last process, if it left any for this layout.
///
/// # Errors
/// If they cannot be removed, and so might be used twice.
pub(crate) fn take(dir: &Path, manifest: &Manifest) -> Result<Option<Vec<Vec<f32>>>> {
    let path = path(dir);
    let Ok(bytes) = fs::read(&path) else { return Ok(None) };
    fs::remove_file(&path).with_context(|| format!("{} cannot be removed", path.display()))?;
    file::sync_folder(&path)?;
    let values = 4 * manifest.parameters();
    let Some((layout, values)) = bytes.split_first_chunk::<32>().filter(|(_, rest)| rest.len() == values) else {
        return Ok(None);
    };
    if *layout != manifest.fingerprint().0 {
        return Ok(None);
    }
    let values: Vec<f32> = values.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
    if check_finite(&values).is_err() {
        return Ok(None); // The disk has damaged it; less is lost than the whole site.
    }
    let mut values = values.into_iter();
    let fragment = |id| values.by_ref().take(manifest.fragment_len(id).unwrap_or(0)).collect();
    Ok(Some(manifest.fragments().map(fragment).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use atoll_core::model::{Tensor, TensorKind};

    #[test]
    fn residuals_are_handed_over_once() {
        let folder = tempfile::tempdir().unwrap();
        let tensors = |columns| {
            vec![Tensor::new("a", &[4, columns], TensorKind::Matrix), Tensor::new("b", &[3], TensorKind::Vector)]
        };
        let manifest = Manifest::balanced(tensors(2), 2);
        let residuals = vec![vec![1.0; 8], vec![-2.0; 3]];
        keep(folder.path(), &manifest, &residuals).unwrap();
        assert_eq!(take(folder.path(), &manifest).unwrap(), Some(residuals.clone()));
        assert_eq!(take(folder.path(), &manifest).unwrap(), None);
        keep(folder.path(), &manifest, &residuals).unwrap();
        assert_eq!(take(folder.path(), &Manifest::balanced(tensors(3), 2)).unwrap(), None, "of another layout");
        keep(folder.path(), &manifest, &[vec![f32::NAN; 8], vec![-2.0; 3]]).unwrap();
        assert_eq!(take(folder.path(), &manifest).unwrap(), None, "no numbers");
    }
}
