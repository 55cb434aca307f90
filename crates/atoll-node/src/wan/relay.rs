//! The sockets of an emulated link. Each connection is a task of its own that moves bytes both ways;
//! all share the link's two [`Bottleneck`]s. The relay knows nothing of what it carries: TLS passes
//! through untouched.

use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use atoll_core::rng::mix;
use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until};

use super::Wan;
use super::path::{Bottleneck, Journey, PACKET};

/// Bytes read at once: few, so that connections take turns.
const PIECE: usize = 8 * PACKET;
/// Pieces of a connection that are on their way or unread at its end, 6 MiB: the window that Linux
/// gives a TCP connection.
const PIECES_MAX: usize = (6 << 20) / PIECE;
/// The relay's own sockets hold little, so that a full link is soon felt by the sender.
const SOCKET_BYTES: usize = 128 << 10;
/// More connections wait until others end.
const CONNECTIONS_MAX: usize = 256;

/// A link between whoever connects to [`address`](Self::address) and a target. It is cut when this is
/// dropped.
#[derive(Debug)]
pub struct Relay {
    address: SocketAddr,
    link: Arc<Link>,
    task: tokio::task::JoinHandle<()>,
}

/// What all connections of a relay share.
#[derive(Debug)]
struct Link {
    wan: Wan,
    target: String,
    seed: u64,
    up: Way,
    down: Way,
}

/// One direction.
#[derive(Debug)]
struct Way {
    bottleneck: Mutex<Bottleneck>,
    bytes: AtomicU64,
}

/// What was read at once, or how reading ended; it comes out at `due`.
struct Piece {
    due: Instant,
    /// No bytes at all mean that the sender has closed its half.
    bytes: io::Result<Vec<u8>>,
}

/// Listens at `listen` and carries every connection to `target` (`host:port`), which is dialed anew for
/// each, over one link. Needs a tokio runtime with time and I/O. The same seed loses the same pieces
/// of each connection.
///
/// # Errors
/// If nothing can listen there.
pub async fn relay(wan: Wan, listen: &str, target: &str, seed: u64) -> Result<Relay> {
    let listener = TcpListener::bind(listen).await;
    let listener = listener.with_context(|| format!("no link can begin at {listen}"))?;
    let address = listener.local_addr()?;
    let way = || Way { bottleneck: Mutex::new(Bottleneck::new(wan, Instant::now())), bytes: AtomicU64::new(0) };
    let link = Arc::new(Link { wan, target: target.to_string(), seed, up: way(), down: way() });
    let task = tokio::spawn(serve(link.clone(), listener));
    Ok(Relay { address, link, task })
}

impl Relay {
    /// Where to connect instead of the target.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Bytes that were put onto the link so far, towards the target and back.
    pub fn bytes(&self) -> (u64, u64) {
        (self.link.up.bytes.load(Ordering::Relaxed), self.link.down.bytes.load(Ordering::Relaxed))
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Takes connections until the task is dropped, and all connections with it.
async fn serve(link: Arc<Link>, listener: TcpListener) {
    let mut connections = JoinSet::new();
    for number in 0u64.. {
        while connections.try_join_next().is_some() {}
        if connections.len() >= CONNECTIONS_MAX {
            connections.join_next().await;
        }
        match listener.accept().await {
            Ok((client, from)) => {
                let link = link.clone();
                connections.spawn(async move {
                    if let Err(error) = connect(&link, number, client).await {
                        tracing::debug!("the link of {from} to {}: {error}", link.target);
                    }
                });
            }
            Err(error) => {
                tracing::warn!("the link to {} could not take a connection: {error}", link.target);
                sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// Carries a connection until both sides have closed it or one has broken it.
async fn connect(link: &Link, number: u64, mut client: TcpStream) -> io::Result<()> {
    prepare(&client)?;
    // TCP's own greeting crosses the link before anything else does.
    sleep(link.wan.round_trip()).await;
    let mut target = TcpStream::connect(&link.target).await?;
    prepare(&target)?;
    let journey = |way: u64| Journey::new(link.wan, mix(link.seed ^ mix(2 * number + way)), Instant::now());
    {
        let ((from_client, to_client), (from_target, to_target)) = (client.split(), target.split());
        tokio::try_join!(
            carry(&link.up, journey(0), from_client, to_target),
            carry(&link.down, journey(1), from_target, to_client),
        )?;
    }
    SockRef::from(&client).set_linger(None)?;
    SockRef::from(&target).set_linger(None)
}

/// A socket that is closed before its orderly end is reset, so that the other side can tell.
fn prepare(socket: &TcpStream) -> io::Result<()> {
    socket.set_nodelay(true)?;
    let socket = SockRef::from(socket);
    socket.set_linger(Some(Duration::ZERO))?;
    socket.set_recv_buffer_size(SOCKET_BYTES)?;
    socket.set_send_buffer_size(SOCKET_BYTES)
}

/// One way of one connection, to its end.
async fn carry(way: &Way, journey: Journey, from: ReadHalf<'_>, to: WriteHalf<'_>) -> io::Result<()> {
    let (entry, exit) = mpsc::channel(PIECES_MAX);
    tokio::try_join!(take_in(way, journey, from, entry), hand_out(exit, to)).map(|_| ())
}

/// Reads while there is room on the link and notes when each piece will arrive. Tells the other end
/// how reading ended, so that what was read before arrives before.
async fn take_in(
    way: &Way,
    mut journey: Journey,
    mut from: ReadHalf<'_>,
    entry: mpsc::Sender<Piece>,
) -> io::Result<()> {
    let mut buffer = vec![0; PIECE];
    while let Ok(place) = entry.reserve().await {
        way.room().await;
        let bytes = from.read(&mut buffer).await.map(|length| buffer[..length].to_vec());
        let length = bytes.as_ref().map_or(0, Vec::len);
        let due = journey.arrival(way.pass(length), length);
        place.send(Piece { due, bytes });
        if length == 0 {
            break;
        }
    }
    Ok(())
}

/// Writes each piece when it is due.
async fn hand_out(mut exit: mpsc::Receiver<Piece>, mut to: WriteHalf<'_>) -> io::Result<()> {
    while let Some(piece) = exit.recv().await {
        sleep_until(piece.due).await;
        let bytes = piece.bytes?;
        if bytes.is_empty() {
            return to.shutdown().await;
        }
        to.write_all(&bytes).await?;
    }
    Ok(())
}

impl Way {
    fn bottleneck(&self) -> MutexGuard<'_, Bottleneck> {
        self.bottleneck.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits while the queue is full. Several that wait may then overfill it by a piece each.
    async fn room(&self) {
        loop {
            let full = self.bottleneck().full_until(Instant::now());
            match full {
                Some(until) => sleep_until(until).await,
                None => return,
            }
        }
    }

    fn pass(&self, bytes: usize) -> Instant {
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        self.bottleneck().pass(Instant::now(), bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use atoll_core::rng::Rng;
    use proptest::prelude::*;

    /// A link to a listener whose end is the test's.
    async fn link_to_here(wan: &str, seed: u64) -> (Relay, TcpListener) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let target = listener.local_addr().unwrap().to_string();
        (relay(wan.parse().unwrap(), "127.0.0.1:0", &target, seed).await.unwrap(), listener)
    }

    /// Sends back what comes until the sender closes its half, then closes the other.
    fn echo(listener: TcpListener) -> tokio::task::JoinHandle<()> {
        tokio::spawn(async move {
            while let Ok((mut socket, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let (mut from, mut to) = socket.split();
                    let _ = tokio::io::copy(&mut from, &mut to).await;
                    let _ = to.shutdown().await;
                });
            }
        })
    }

    fn noise(seed: u64, bytes: usize) -> Vec<u8> {
        let mut rng = Rng::new(seed);
        (0..bytes).map(|_| rng.next_u64() as u8).collect()
    }

    /// Sends bytes in slices of random lengths and returns all that comes back.
    async fn there_and_back(address: SocketAddr, seed: u64, sent: Vec<u8>) -> Vec<u8> {
        let (mut from, mut to) = TcpStream::connect(address).await.unwrap().into_split();
        let write = async move {
            let (mut rng, mut rest) = (Rng::new(seed), &sent[..]);
            while !rest.is_empty() {
                let (slice, after) = rest.split_at(rest.len().min(1 + rng.below(40_000) as usize));
                to.write_all(slice).await.unwrap();
                rest = after;
            }
            to.shutdown().await.unwrap();
        };
        let read = async {
            let mut received = Vec::new();
            from.read_to_end(&mut received).await.unwrap();
            received
        };
        tokio::join!(write, read).1
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(12))]
        #[test]
        fn bytes_come_back_unchanged_and_in_order(seed: u64, lengths in prop::collection::vec(0usize..150_000, 1..6)) {
            let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
            runtime.block_on(async {
                let (relay, listener) = link_to_here("400mbit,2ms,1ms,3%", seed).await;
                let echo = echo(listener);
                let mut all = JoinSet::new();
                for (index, &length) in lengths.iter().enumerate() {
                    let (sent, address) = (noise(seed ^ index as u64, length), relay.address());
                    all.spawn(async move { (there_and_back(address, seed, sent.clone()).await, sent) });
                }
                while let Some(pair) = all.join_next().await {
                    let (received, sent) = pair.unwrap();
                    assert!(received == sent, "{} bytes of {}", received.len(), sent.len());
                }
                let total: usize = lengths.iter().sum();
                assert_eq!(relay.bytes(), (total as u64, total as u64));
                echo.abort();
            });
        }
    }

    #[tokio::test]
    async fn connections_share_the_rate() {
        const BYTES: usize = 300_000;
        let (relay, listener) = link_to_here("20mbit,10ms", 1).await;
        let echo = echo(listener);
        let began = Instant::now();
        let one = tokio::spawn(there_and_back(relay.address(), 1, noise(1, BYTES)));
        let two = tokio::spawn(there_and_back(relay.address(), 2, noise(2, BYTES)));
        one.await.unwrap();
        two.await.unwrap();
        let least = Duration::from_millis(10 + 10) + Duration::from_secs_f64(2.0 * BYTES as f64 * 8.0 / 20e6);
        assert!(began.elapsed() >= least, "{:?} are too fast, {least:?} are needed", began.elapsed());
        echo.abort();
    }

    #[tokio::test]
    async fn every_answer_takes_a_round_trip() {
        let (relay, listener) = link_to_here("30ms,1ms", 1).await;
        let echo = echo(listener);
        let mut began = Instant::now();
        let mut socket = TcpStream::connect(relay.address()).await.unwrap();
        // The first answer also waits for TCP's greeting.
        for trips in [2, 1, 1] {
            socket.write_all(b"a").await.unwrap();
            assert_eq!(socket.read_u8().await.unwrap(), b'a');
            assert!(began.elapsed() >= Duration::from_millis(30) * trips, "{:?}", began.elapsed());
            began = Instant::now();
        }
        echo.abort();
    }

    #[tokio::test]
    async fn a_reader_that_stops_stops_the_sender() {
        let (relay, listener) = link_to_here("10ms", 1).await;
        let mut client = TcpStream::connect(relay.address()).await.unwrap();
        let (_unread, _) = listener.accept().await.unwrap();
        let sender = tokio::spawn(async move { client.write_all(&vec![1; 64 << 20]).await });
        let mut before = 0;
        loop {
            sleep(Duration::from_millis(300)).await;
            match relay.bytes().0 {
                now if now > before => before = now,
                _ => break,
            }
        }
        assert!(!sender.is_finished());
        // The window, and what the kernel keeps for the reader (6 MiB) and the writer.
        assert!(before < 16 << 20, "{before} bytes were taken in");
        sender.abort();
    }

    #[tokio::test]
    async fn a_full_link_stops_the_sender() {
        let (relay, listener) = link_to_here("64kbit", 1).await;
        let mut client = TcpStream::connect(relay.address()).await.unwrap();
        let began = Instant::now();
        let sender = tokio::spawn(async move { client.write_all(&vec![1; 8 << 20]).await });
        let (_unread, _) = listener.accept().await.unwrap();
        sleep(Duration::from_millis(500)).await;
        let taken = relay.bytes().0;
        let most = (64 << 10) + PIECE as u64 + (began.elapsed().as_secs_f64() * 8000.0) as u64;
        assert!(taken <= most, "{taken} bytes were taken in, {most} are allowed");
        assert!(!sender.is_finished());
        sender.abort();
    }

    #[tokio::test]
    async fn each_half_closes_alone() {
        let (relay, listener) = link_to_here("1ms", 1).await;
        let mut client = TcpStream::connect(relay.address()).await.unwrap();
        let (mut target, _) = listener.accept().await.unwrap();
        client.write_all(b"question").await.unwrap();
        client.shutdown().await.unwrap();
        let mut text = String::new();
        target.read_to_string(&mut text).await.unwrap();
        target.write_all(b"answer").await.unwrap();
        drop(target);
        client.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "questionanswer");
    }

    #[tokio::test]
    async fn a_target_may_be_away_and_come_back() {
        let (relay, listener) = link_to_here("1ms", 1).await;
        let target = listener.local_addr().unwrap();
        drop(listener);
        let mut refused = TcpStream::connect(relay.address()).await.unwrap();
        assert!(refused.read(&mut [0]).await.is_err());
        let echo = echo(TcpListener::bind(target).await.unwrap());
        assert_eq!(there_and_back(relay.address(), 1, b"again".to_vec()).await, b"again");
        echo.abort();
    }

    #[tokio::test]
    async fn a_broken_connection_ends_on_both_sides() {
        for client_breaks in [true, false] {
            let (relay, listener) = link_to_here("1ms", 1).await;
            let client = TcpStream::connect(relay.address()).await.unwrap();
            let (target, _) = listener.accept().await.unwrap();
            let (broken, mut other) = if client_breaks { (client, target) } else { (target, client) };
            SockRef::from(&broken).set_linger(Some(Duration::ZERO)).unwrap();
            drop(broken);
            assert!(other.read(&mut [0]).await.is_err());
        }
    }

    #[tokio::test]
    async fn a_dropped_relay_cuts_the_link() {
        let (relay, listener) = link_to_here("1ms", 1).await;
        let mut client = TcpStream::connect(relay.address()).await.unwrap();
        let (mut target, _) = listener.accept().await.unwrap();
        let address = relay.address();
        drop(relay);
        assert!(client.read(&mut [0]).await.is_err());
        assert!(target.read(&mut [0]).await.is_err());
        assert!(TcpStream::connect(address).await.is_err());
    }
}
