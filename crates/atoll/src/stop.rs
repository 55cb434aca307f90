//! Stopping on purpose: Ctrl-C, SIGTERM, or a parent process that is gone.

use std::io::Read;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};

/// A flag that turns true when this process should stop. With `supervised`, also when standard input
/// ends: a child of `atoll demo` must not outlive it.
pub(crate) fn flag(supervised: bool) -> Result<Arc<AtomicBool>> {
    let flag = Arc::new(AtomicBool::new(false));
    let raised = flag.clone();
    ctrlc::set_handler(move || {
        if raised.swap(true, Ordering::SeqCst) {
            std::process::exit(130); // Asked twice: go at once.
        }
    })
    .context("signals cannot be handled")?;
    if supervised {
        let raised = flag.clone();
        std::thread::spawn(move || {
            let mut byte = [0u8; 64];
            while matches!(std::io::stdin().read(&mut byte), Ok(1..)) {}
            raised.store(true, Ordering::SeqCst);
        });
    }
    Ok(flag)
}
