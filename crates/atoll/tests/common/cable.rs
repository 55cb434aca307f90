//! A link that can be thin and can be cut.

use std::time::{Duration, Instant};

use atoll_node::wan::{Relay, relay};

/// A link that can be cut: what goes over it is counted over all its lives.
pub struct Cable {
    runtime: tokio::runtime::Runtime,
    relay: Option<Relay>,
    wan: &'static str,
    pub address: String,
    target: String,
    before: u64,
}

impl Cable {
    /// To `target`, over such a network.
    pub fn lay(target: String, wan: &'static str) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let mut cable = Self { runtime, relay: None, wan, address: "127.0.0.1:0".to_string(), target, before: 0 };
        cable.mend();
        cable
    }

    pub fn mend(&mut self) {
        let wan = self.wan.parse().unwrap();
        let relay = self.runtime.block_on(relay(wan, &self.address, &self.target, 1)).unwrap();
        self.address = relay.address().to_string();
        self.relay = Some(relay);
    }

    pub fn cut(&mut self) {
        self.before = self.down();
        self.relay = None;
    }

    /// Bytes that were sent to the site.
    pub fn down(&self) -> u64 {
        self.before + self.relay.as_ref().map_or(0, |relay| relay.bytes().1)
    }

    pub fn wait_for(&self, bytes: u64) {
        let began = Instant::now();
        while self.down() < bytes {
            assert!(began.elapsed() < Duration::from_secs(120), "{} of {bytes} bytes came", self.down());
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}
