//! An object store: a folder, or a bucket of S3 and what speaks like it, Huawei OBS, Alibaba OSS or Tencent COS, through
//! OpenDAL. Objects appear whole or not at all, and [`Objects::create`] lets exactly one of all who try put an object
//! under a name: on that rests who leads a run.

use std::fs;
use std::future::Future;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use opendal::layers::{RetryLayer, TimeoutLayer};
use opendal::options::WriteOptions;
use opendal::{Configurator, Operator, OperatorUri, services};
use tokio::runtime::Runtime;

use crate::data::file;

/// Who put the object that is now there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Created {
    /// This call.
    Now,
    /// Somebody, earlier.
    Before,
}

/// The store did not do what it was asked, and may do it later.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct StoreFailed(String);

/// A store of objects by name. Names are relative paths of plain letters; all calls block.
#[derive(Debug, Clone)]
pub struct Objects {
    place: String,
    kind: Kind,
}

#[derive(Debug, Clone)]
enum Kind {
    Folder(PathBuf),
    Bucket(Operator, Arc<Thread>),
}

/// Where requests to a bucket are carried out, so that whoever asks can wait for them.
#[derive(Debug)]
struct Thread(Option<Runtime>);

impl Thread {
    fn start() -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        Ok(Self(Some(runtime)))
    }

    /// Does some work there and waits for it, also where tasks must not be waited for.
    fn run<T: Send + 'static>(&self, work: impl Future<Output = T> + Send + 'static) -> Result<T> {
        let (sender, answer) = mpsc::sync_channel(1);
        if let Some(runtime) = &self.0 {
            runtime.spawn(async move {
                let _ = sender.send(work.await);
            });
        }
        answer.recv().map_err(|_| anyhow!("the object store's thread died"))
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        // It may be dropped by a task, which must not wait for it.
        self.0.take().into_iter().for_each(Runtime::shutdown_background);
    }
}

/// A request is tried so often before its failure is told.
const TRIES: usize = 4;
/// A request that is not answered for so long is tried again.
const ANSWER_SECONDS: u64 = 10;
/// The bucket kinds: name in addresses, and where their credentials come from.
const BUCKETS: [(&str, &str); 4] = [
    ("s3", "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
    ("obs", "HUAWEI_CLOUD_ACCESS_KEY_ID and HUAWEI_CLOUD_SECRET_ACCESS_KEY"),
    ("oss", "ALIBABA_CLOUD_ACCESS_KEY_ID and ALIBABA_CLOUD_ACCESS_KEY_SECRET"),
    ("cos", "TENCENTCLOUD_SECRET_ID and TENCENTCLOUD_SECRET_KEY"),
];

impl Objects {
    /// Opens the store at `address`: a folder's path, or `s3://bucket/prefix?endpoint=https://…&region=…`, and the same
    /// with `obs`, `oss` and `cos`. Credentials come from the environment.
    ///
    /// # Errors
    /// If the address is none, or the folder cannot be made. Buckets are not looked at yet.
    pub fn open(address: &str) -> Result<Self> {
        let kind = match address.split_once("://") {
            Some(("file", path)) => Self::folder(path)?,
            None => Self::folder(address)?,
            Some((scheme, _)) => Self::bucket(scheme, address)?,
        };
        Ok(Self { place: address.to_string(), kind })
    }

    fn folder(path: &str) -> Result<Kind> {
        if path.is_empty() {
            bail!("the object store's address is empty\nhint: give a folder, or s3://bucket/prefix");
        }
        file::make_folder(Path::new(path)).with_context(|| format!("{path} cannot be made"))?;
        Ok(Kind::Folder(PathBuf::from(path)))
    }

    fn bucket(scheme: &str, address: &str) -> Result<Kind> {
        let uri = OperatorUri::new(address, Vec::<(String, String)>::new())
            .map_err(|error| anyhow!("{address} is no address of an object store: {error}"))?;
        if uri.authority().is_some_and(|authority| authority.contains('@')) {
            bail!("an object store's address has no user in it\nhint: put credentials into the environment");
        }
        let secrets = ["key", "secret", "token", "password"];
        if let Some(name) = uri.options().keys().find(|name| secrets.iter().any(|secret| name.contains(secret))) {
            bail!(
                "{name} does not belong into the object store's address, which is shown to people\nhint: put credentials into the environment"
            );
        }
        // The HTTP client takes rustls' provider from here; whoever set one before has set the same.
        let _ = rustls::crypto::ring::default_provider().install_default();
        opendal_http_transport_reqwest::install_default();
        let operator = match scheme {
            "s3" => services::S3Config::from_uri(&uri).and_then(Operator::from_config),
            "obs" => services::ObsConfig::from_uri(&uri).and_then(Operator::from_config),
            "oss" => services::OssConfig::from_uri(&uri).and_then(Operator::from_config),
            "cos" => services::CosConfig::from_uri(&uri).and_then(Operator::from_config),
            _ => bail!(
                "there is no object store of kind {scheme}\nhint: a folder's path, s3://, obs://, oss:// or cos://"
            ),
        };
        let operator = operator.map_err(|error| {
            anyhow!("{address} cannot be opened: {error}\nhint: the address takes ?endpoint=… and, for s3, &region=…")
        })?;
        let patience = TimeoutLayer::new().with_timeout(Duration::from_secs(ANSWER_SECONDS));
        let retry = RetryLayer::new().with_max_times(TRIES).with_min_delay(Duration::from_millis(50)).with_jitter();
        let operator = operator.layer(patience).layer(retry);
        Ok(Kind::Bucket(operator, Arc::new(Thread::start()?)))
    }

    /// Where it is, for people.
    pub fn place(&self) -> &str {
        &self.place
    }

    /// Whether [`create`](Self::create) tells who came first, which a standby needs.
    pub fn tells_who_came_first(&self) -> bool {
        match &self.kind {
            Kind::Folder(_) => true,
            Kind::Bucket(operator, _) => operator.info().capability().write_with_if_not_exists,
        }
    }

    /// Whether of two objects that must be new the first stays, tried for once: a server may ignore what it does not know.
    ///
    /// # Errors
    /// If the store fails.
    pub fn keeps_the_first(&self) -> Result<bool> {
        let name = format!("probe/{:016x}", rand_name());
        let answers = [self.create(&name, b"first")?, self.create(&name, b"second")?];
        let stays = self.get(&name)?.is_some_and(|bytes| bytes == b"first");
        self.remove(&name)?;
        Ok(self.tells_who_came_first() && answers == [Created::Now, Created::Before] && stays)
    }

    /// Puts an object under a name that has none; if it has one, that one stays.
    ///
    /// # Errors
    /// If the store fails; then nobody knows whether it is there.
    pub fn create(&self, name: &str, bytes: &[u8]) -> Result<Created> {
        let created = match &self.kind {
            Kind::Folder(folder) => create_file(&folder.join(name), bytes).map_err(anyhow::Error::from),
            Kind::Bucket(operator, thread) if self.tells_who_came_first() => {
                let (operator, name, bytes) = (operator.clone(), name.to_string(), bytes.to_vec());
                let only_new = WriteOptions { if_not_exists: true, ..WriteOptions::default() };
                match thread.run(async move { operator.write_options(&name, bytes, only_new).await })? {
                    Ok(_) => Ok(Created::Now),
                    Err(error) if is_there(&error) => Ok(Created::Before),
                    Err(error) => Err(error.into()),
                }
            }
            Kind::Bucket(..) if self.has(name)? => Ok(Created::Before),
            Kind::Bucket(..) => self.put(name, bytes).map(|()| Created::Now),
        };
        created.with_context(|| self.complaint("written to", name))
    }

    /// Puts an object, instead of one that may be there.
    ///
    /// # Errors
    /// If the store fails.
    pub fn put(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let put = match &self.kind {
            Kind::Folder(folder) => {
                let path = folder.join(name);
                make_parent(&path).and_then(|()| file::write(&path, bytes)).map_err(anyhow::Error::from)
            }
            Kind::Bucket(operator, thread) => {
                let (operator, name, bytes) = (operator.clone(), name.to_string(), bytes.to_vec());
                let put = thread.run(async move { operator.write(&name, bytes).await })?;
                put.map(drop).map_err(anyhow::Error::from)
            }
        };
        put.with_context(|| self.complaint("written to", name))
    }

    /// The object of that name, if there is one.
    ///
    /// # Errors
    /// If the store fails.
    pub fn get(&self, name: &str) -> Result<Option<Vec<u8>>> {
        let got = match &self.kind {
            Kind::Folder(folder) => match fs::read(folder.join(name)) {
                Ok(bytes) => Ok(Some(bytes)),
                Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
                Err(error) => Err(anyhow::Error::from(error)),
            },
            Kind::Bucket(operator, thread) => {
                let (operator, name) = (operator.clone(), name.to_string());
                match thread.run(async move { operator.read(&name).await })? {
                    Ok(bytes) => Ok(Some(bytes.to_vec())),
                    Err(error) if error.kind() == opendal::ErrorKind::NotFound => Ok(None),
                    Err(error) => Err(error.into()),
                }
            }
        };
        got.with_context(|| self.complaint("read from", name))
    }

    /// Whether there is an object of that name.
    ///
    /// # Errors
    /// If the store fails.
    pub fn has(&self, name: &str) -> Result<bool> {
        let has = match &self.kind {
            Kind::Folder(folder) => folder.join(name).try_exists().map_err(anyhow::Error::from),
            Kind::Bucket(operator, thread) => {
                let (operator, name) = (operator.clone(), name.to_string());
                thread.run(async move { operator.exists(&name).await })?.map_err(anyhow::Error::from)
            }
        };
        has.with_context(|| self.complaint("read from", name))
    }

    /// Names of the objects in `folder`, without it, sorted.
    ///
    /// # Errors
    /// If the store fails.
    pub fn list(&self, folder: &str) -> Result<Vec<String>> {
        let names = match &self.kind {
            Kind::Folder(root) => list_folder(&root.join(folder)).map_err(anyhow::Error::from),
            Kind::Bucket(operator, thread) => {
                let (operator, path) = (operator.clone(), format!("{folder}/"));
                let entries = thread.run(async move { operator.list(&path).await })?;
                let files = |entries: Vec<opendal::Entry>| {
                    let files = entries.into_iter().filter(|entry| entry.metadata().is_file());
                    files.map(|entry| entry.name().to_string()).collect()
                };
                entries.map(files).map_err(anyhow::Error::from)
            }
        };
        let mut names: Vec<String> = names.with_context(|| self.complaint("listed in", folder))?;
        names.sort();
        Ok(names)
    }

    /// Drops the object of that name, if there is one.
    ///
    /// # Errors
    /// If the store fails.
    pub fn remove(&self, name: &str) -> Result<()> {
        let removed = match &self.kind {
            Kind::Folder(folder) => match fs::remove_file(folder.join(name)) {
                Err(error) if error.kind() != ErrorKind::NotFound => Err(anyhow::Error::from(error)),
                _ => Ok(()),
            },
            Kind::Bucket(operator, thread) => {
                let (operator, name) = (operator.clone(), name.to_string());
                thread.run(async move { operator.delete(&name).await })?.map_err(anyhow::Error::from)
            }
        };
        removed.with_context(|| self.complaint("removed from", name))
    }

    fn complaint(&self, done: &str, name: &str) -> StoreFailed {
        let hint = match self.place.split_once("://").and_then(|(scheme, _)| BUCKETS.iter().find(|at| at.0 == scheme)) {
            Some((_, credentials)) => format!("is it reachable, and are {credentials} set?"),
            None => "is the disk full, or the folder read-only?".to_string(),
        };
        StoreFailed(format!("{name} cannot be {done} the object store {}\nhint: {hint}", self.place))
    }
}

/// What stores answer if a name that must be new is not: the second if somebody is putting it at this moment.
fn is_there(error: &opendal::Error) -> bool {
    matches!(error.kind(), opendal::ErrorKind::ConditionNotMatch | opendal::ErrorKind::AlreadyExists)
}

fn make_parent(path: &Path) -> std::io::Result<()> {
    match path.parent() {
        Some(folder) if !folder.exists() => file::make_folder(folder),
        _ => Ok(()),
    }
}

/// Puts a file where none is: a link to a whole one is made or refused in one step.
fn create_file(path: &Path, bytes: &[u8]) -> std::io::Result<Created> {
    make_parent(path)?;
    if path.exists() {
        return Ok(Created::Before);
    }
    let mut new = Created::Now;
    let whole = path.with_extension(format!("{:016x}.new", rand_name()));
    file::write(&whole, bytes)?;
    match fs::hard_link(&whole, path) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => new = Created::Before,
        other => other?,
    }
    fs::remove_file(&whole)?;
    file::sync_folder(path)?;
    Ok(new)
}

/// A number that no other process or thread comes upon.
fn rand_name() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(std::process::id())
}

fn list_folder(folder: &Path) -> std::io::Result<Vec<String>> {
    let listing = match fs::read_dir(folder) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        listing => listing?,
    };
    let mut names = Vec::new();
    for file in listing {
        let name = file?.file_name().to_string_lossy().into_owned();
        if !name.ends_with(".new") && !name.starts_with('.') {
            names.push(name);
        }
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder() -> (tempfile::TempDir, Objects) {
        let folder = tempfile::tempdir().unwrap();
        let objects = Objects::open(&folder.path().join("store").to_string_lossy()).unwrap();
        (folder, objects)
    }

    #[test]
    fn objects_come_and_go() {
        let (_folder, objects) = folder();
        assert_eq!(objects.get("a/1").unwrap(), None);
        assert_eq!(objects.list("a").unwrap(), Vec::<String>::new());
        objects.put("a/1", b"one").unwrap();
        objects.put("a/2", b"two").unwrap();
        objects.put("a/1", b"eins").unwrap();
        assert_eq!(objects.get("a/1").unwrap().as_deref(), Some(&b"eins"[..]));
        assert_eq!(objects.list("a").unwrap(), ["1", "2"]);
        objects.remove("a/1").unwrap();
        objects.remove("a/1").unwrap();
        assert!(!objects.has("a/1").unwrap() && objects.has("a/2").unwrap());
    }

    #[test]
    fn of_all_who_create_a_name_one_does() {
        let (_folder, objects) = folder();
        for round in 0..20 {
            let name = format!("journal/{round}");
            let create = |who: u8| objects.create(&name, &vec![who; 10_000]).unwrap();
            let created: Vec<Created> = std::thread::scope(|scope| {
                let threads: Vec<_> = (0..4u8).map(|who| scope.spawn(move || create(who))).collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).collect()
            });
            let winner = created.iter().position(|created| *created == Created::Now).unwrap();
            assert_eq!(created.iter().filter(|created| **created == Created::Now).count(), 1);
            assert_eq!(objects.get(&name).unwrap(), Some(vec![winner as u8; 10_000]), "whole, and the winner's");
        }
        assert_eq!(objects.list("journal").unwrap().len(), 20, "nothing else is left behind");
    }

    #[test]
    fn credentials_in_addresses_and_unknown_kinds_are_refused() {
        let refused = |address: &str| format!("{:#}", Objects::open(address).unwrap_err());
        assert!(refused("s3://b/p?secret_access_key=x").contains("into the environment"));
        assert!(refused("ftp://host/x").contains("hint: a folder's path"));
        assert!(refused("").contains("hint:"));
        assert!(refused("s3://").contains("hint:") || refused("s3://").contains("no address"));
    }
}
