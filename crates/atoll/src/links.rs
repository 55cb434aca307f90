//! Emulated links of the demo (`--wan`): one [`Relay`] per site, on a thread of their own, between the
//! site and the coordinator. A site is led to its relay by its ticket.

use std::net::SocketAddr;

use anyhow::{Context, Result};
use atoll_node::wan::{Relay, Wan, relay};
use tokio::runtime::{Builder, Runtime};

use crate::view::bytes;

pub(crate) struct Links {
    wan: Wan,
    relays: Vec<(String, Relay)>,
    /// The last field, so that the relays are gone before it.
    runtime: Runtime,
}

impl Links {
    /// No link yet; says what they will be like.
    pub(crate) fn new(wan: Wan) -> Result<Self> {
        eprintln!("each site has an emulated link of its own to the coordinator: {}", wan.in_words());
        let runtime = Builder::new_multi_thread().worker_threads(1).thread_name("links").enable_all().build();
        Ok(Self { wan, relays: Vec::new(), runtime: runtime.context("no thread can be started for the links")? })
    }

    /// A new link from `site` to `coordinator`; returns where it begins.
    pub(crate) fn lay(&mut self, site: &str, coordinator: &str) -> Result<SocketAddr> {
        // Every site has luck of its own, the same in every demo.
        let seed = self.relays.len() as u64;
        let relay = self.runtime.block_on(relay(self.wan, "127.0.0.1:0", coordinator, seed))?;
        let address = relay.address();
        self.relays.push((site.to_string(), relay));
        Ok(address)
    }

    /// What went over each link, a line per site.
    pub(crate) fn lines(&self) -> Vec<String> {
        let line = |(site, relay): &(String, Relay)| {
            let (up, down) = relay.bytes();
            format!("link     {site}, {}: ↑ {}, ↓ {}", self.wan, bytes(up), bytes(down))
        };
        self.relays.iter().map(line).collect()
    }
}
