//! Who is who. Coordinator and sites each own an ed25519 key; there is no certificate authority. A
//! **ticket** carries all that a site needs to find a coordinator and to be let in once: addresses,
//! the fingerprint of the coordinator's key, and a secret.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail};
use atoll_core::hash::Digest;
use atoll_core::journal::{Act, Invitation};
use atoll_core::site::SiteId;
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use ring::rand::{SecureRandom, SystemRandom};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::sign::CertifiedKey;
use serde::{Deserialize, Serialize};

use crate::acts;
use crate::data::file;
use crate::run::RunDir;

/// A key pair, ready for handshakes.
#[derive(Debug, Clone)]
pub struct Identity {
    /// Key and public key as TLS wants them.
    pub certified: Arc<CertifiedKey>,
    /// Fingerprint: hash of the public key.
    pub fingerprint: Digest,
}

impl Identity {
    /// Reads the key at `path`, or makes one and writes it there, readable by its owner only.
    ///
    /// # Errors
    /// If the file cannot be read or written, or holds no ed25519 key.
    pub fn load_or_create(path: &Path) -> Result<Self> {
        if !path.exists() {
            create_key(path)?;
        }
        Self::load(path)
    }

    /// Reads the key at `path`.
    ///
    /// # Errors
    /// If the file cannot be read or holds no ed25519 key.
    pub fn load(path: &Path) -> Result<Self> {
        let key = PrivateKeyDer::from_pem_file(path).map_err(|error| {
            anyhow!(
                "{} holds no key: {error}\nhint: restore it from a backup; a new key is a new identity",
                path.display()
            )
        })?;
        let signing = rustls::crypto::ring::sign::any_eddsa_type(&match key {
            PrivateKeyDer::Pkcs8(key) => key,
            _ => bail!("{} holds no ed25519 key in PKCS #8", path.display()),
        })
        .map_err(|error| anyhow!("{} holds no ed25519 key: {error}", path.display()))?;
        let public = signing.public_key().ok_or_else(|| anyhow!("{} has no public key", path.display()))?;
        let certificate = CertificateDer::from(public.as_ref().to_vec());
        let fingerprint = Digest::of(&certificate);
        Ok(Self { certified: Arc::new(CertifiedKey::new(vec![certificate], signing)), fingerprint })
    }
}

fn create_key(path: &Path) -> Result<()> {
    let pkcs8 = ring::signature::Ed25519KeyPair::generate_pkcs8(&SystemRandom::new())
        .map_err(|_| anyhow!("the system gives no randomness for a key"))?;
    let key = PrivatePkcs8KeyDer::from(pkcs8.as_ref().to_vec());
    let text = STANDARD.encode(key.secret_pkcs8_der());
    let pem = format!("-----BEGIN PRIVATE KEY-----\n{text}\n-----END PRIVATE KEY-----\n");
    file::write_with(path, |temporary| private(temporary)?.write_all(pem.as_bytes())).with_context(|| {
        format!("{} cannot be written\nhint: is the disk full, or the folder read-only?", path.display())
    })
}

/// A new file that nobody but its owner may ever read.
fn private(path: &Path) -> io::Result<File> {
    let mut options = File::options();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options.open(path)
}

/// What a site needs to join a run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ticket {
    /// Name of the run.
    pub run: String,
    /// Name of the site.
    pub site: SiteId,
    /// Where the coordinator listens, `host:port`; tried in order.
    pub addresses: Vec<String>,
    /// Fingerprint of the coordinator's key.
    pub coordinator: Digest,
    /// Lets one key in.
    pub secret: Digest,
    /// Until when, in seconds since 1970; none for ever. What counts is what the journal says.
    #[serde(default)]
    pub expires: Option<u64>,
}

const PREFIX: &str = "atoll1.";

impl Ticket {
    /// Makes a ticket, and asks for what it promises in the run folder.
    ///
    /// # Errors
    /// If the folder cannot be written.
    pub fn issue(
        dir: &RunDir,
        run: &str,
        invitation: Invitation,
        addresses: Vec<String>,
        coordinator: Digest,
    ) -> Result<Self> {
        let ticket = Self::make(run, &invitation, addresses, coordinator)?;
        acts::ask(dir, &Act::Invite(ticket.hash(), invitation))?;
        Ok(ticket)
    }

    /// Makes a ticket that is worth nothing before the run knows of it.
    ///
    /// # Errors
    /// If the system gives no randomness.
    pub fn make(run: &str, invitation: &Invitation, addresses: Vec<String>, coordinator: Digest) -> Result<Self> {
        let mut secret = [0u8; 32];
        SystemRandom::new().fill(&mut secret).map_err(|_| anyhow!("the system gives no randomness for a secret"))?;
        let (run, secret) = (run.to_string(), Digest(secret));
        let &Invitation { ref site, expires, .. } = invitation;
        Ok(Self { run, site: site.clone(), addresses, coordinator, secret, expires })
    }

    /// By which the run knows it.
    pub fn hash(&self) -> Digest {
        Digest::of(&self.secret.0)
    }

    /// One line of text to hand over.
    pub fn to_text(&self) -> String {
        let json = serde_json::to_vec(self).expect("a ticket is plain data");
        let check = Digest::of(&json);
        format!("{PREFIX}{}.{}", URL_SAFE_NO_PAD.encode(&json), &check.to_string()[..8])
    }

    /// Reads what [`to_text`](Self::to_text) wrote.
    ///
    /// # Errors
    /// If the text is no ticket, or not all of it.
    pub fn from_text(text: &str) -> Result<Self> {
        let hint = "hint: copy the whole line that `atoll ticket` printed; it starts with atoll1.";
        let body = text.trim().strip_prefix(PREFIX).ok_or_else(|| anyhow!("this is no ticket\n{hint}"))?;
        let (json, check) = body.split_once('.').ok_or_else(|| anyhow!("the ticket is cut short\n{hint}"))?;
        let json = URL_SAFE_NO_PAD.decode(json).map_err(|_| anyhow!("the ticket is damaged\n{hint}"))?;
        if check != &Digest::of(&json).to_string()[..8] {
            bail!("the ticket is damaged or cut short\n{hint}");
        }
        serde_json::from_slice(&json).map_err(|_| anyhow!("the ticket is of another version of Atoll\n{hint}"))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use atoll_core::journal::Role;

    #[test]
    fn a_key_is_made_once_and_stays() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("site.key");
        let first = Identity::load_or_create(&path).unwrap();
        assert_eq!(Identity::load_or_create(&path).unwrap().fingerprint, first.fingerprint);
        fs::write(&path, "nonsense").unwrap();
        assert!(Identity::load_or_create(&path).unwrap_err().to_string().contains("holds no key"));
    }

    #[test]
    fn tickets_round_trip_and_damage_is_seen() {
        let folder = tempfile::tempdir().unwrap();
        let dir = RunDir(folder.path().to_path_buf());
        let invitation = Invitation { site: "oslo".parse().unwrap(), role: Role::Train, expires: Some(100) };
        let (at, key) = (vec!["[::1]:1".to_string()], Digest::of(b"k"));
        let ticket = Ticket::issue(&dir, "r", invitation.clone(), at, key).unwrap();
        let text = ticket.to_text();
        assert_eq!(Ticket::from_text(&text).unwrap(), ticket);
        let asked: Vec<Act> = acts::pending(&dir).unwrap().into_iter().map(|(_, act)| act).collect();
        assert_eq!(asked, [Act::Invite(ticket.hash(), invitation)]);
        for bad in ["", "hello", &text[..text.len() - 3], &text.replace("atoll1.", "atoll1.A")] {
            let error = Ticket::from_text(bad).unwrap_err().to_string();
            assert!(error.contains("hint:"), "{error}");
        }
    }
}
