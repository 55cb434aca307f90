//! The site's connections, on threads of their own: one control connection and several data
//! connections that live and die together, and more while the model is fetched (see [`donors`](super::donors)). When one breaks all are made anew, and the machine sends
//! again what is still wanted.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, mpsc::Sender};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, bail};
use atoll_core::data::Ranges;
use atoll_core::engine::EngineError;
use atoll_core::hash::Digest;
use atoll_core::manifest::FragmentId;
use atoll_core::round::{Standing, Status};
use atoll_core::wire::{CHUNK, Frame, Purpose, Welcome};
use tokio::io::AsyncWriteExt;
use tokio::sync::{SemaphorePermit, mpsc};
use tokio::task::JoinSet;

use super::arriving::{Arriving, Partial, Weights};
use super::desk::Done;
use super::donors::{Donor, Suspicion};
use super::meter::Meter;
use super::parcel::Parcel;
use super::pile::{Piece, Pile};
use super::told;
use super::trainer::Pause;
use super::window::Window;
use crate::coordinator::lock;
use crate::link::{Link, read_frame, write_frame};
use crate::way::{Refusals, Way, fetch_tokenizer};

/// What comes in from the network.
pub(super) enum Incoming {
    Connected,
    Disconnected,
    Standing(Box<Standing>),
    Uploaded(Digest, bool),
    Fetched(Digest, Option<Parcel>),
    /// The payload of a commit, which nobody asked for.
    Pushed(Digest, Vec<u8>),
    /// From the desk, over the same channel, so that the clerk waits for all.
    Worked(Done),
    /// From the trainer.
    Paused(Result<Pause, EngineError>),
    /// The coordinator does not want this site; no retry will help.
    Refused(String),
}

/// What the site wants from the network.
#[derive(Debug)]
pub(super) enum Command {
    Report(Box<Status>),
    Upload(Digest, Arc<Vec<u8>>),
    /// Bytes by their address; of whose weights and which version, if they are weights.
    Fetch(Digest, u64, Option<(FragmentId, u64)>),
}

/// How to reach the coordinator.
#[derive(Clone)]
pub(super) struct Route {
    pub(super) way: Way,
    /// Data connections.
    pub(super) streams: usize,
    /// Bytes of the largest fragment's weights.
    pub(super) largest: usize,
    pub(super) meter: Meter,
    /// What outlives a process of weights that are being fetched.
    pub(super) arriving: Arriving,
    pub(super) suspicion: Suspicion,
}

/// How fast a long pause is forgotten, from answer to answer.
const FORGETTING: f64 = 0.1;
/// Gets that may be unanswered per data connection, if they are answered soon: 8 MiB, more than a kernel lets a connection send
/// ahead unless it is told to.
const GETS_AHEAD: usize = 256;
/// Gets that may be unanswered before it is known how soon they are answered.
const GETS_AT_FIRST: usize = 8;
/// A status is repeated after this many seconds, so that a busy site does not look like a silent one.
const REPEAT_SECONDS: u64 = 1;
/// Between two attempts to connect at most: a coordinator that is back should not be waited for.
const RETRY_SECONDS_MAX: f64 = 2.0;

impl Route {
    /// Whoever has weights to give: those that may stand by, and the leader once more. A kernel lets a connection send a few
    /// megabytes ahead, which is less than a fast and long link holds; but more connections would be of no use to a site that trains.
    fn donors(&self) -> impl Iterator<Item = Donor> {
        let donor = |address, leads| {
            let Self { way, streams, suspicion, .. } = self.clone();
            Donor { address, leads, way, streams, suspicion }
        };
        let others = self.way.doors.others().into_iter().map(move |address| donor(address, false));
        others.chain(self.way.doors.last().map(|address| donor(address, true)))
    }

    /// Connects once, patiently, and fetches the tokenizer unless `have` says that it is known.
    pub(super) async fn enlist(
        &self,
        have: impl Fn(Digest) -> Option<Vec<u8>>,
        mut waiting: impl FnMut(&anyhow::Error),
    ) -> Result<(Welcome, Vec<u8>)> {
        let (mut pause, mut refusals) = (0.2, Refusals::default());
        loop {
            let attempt = async {
                let (mut link, welcome) = self.way.greet(Purpose::Enlist).await?;
                let tokenizer = match have(welcome.tokenizer) {
                    Some(tokenizer) => tokenizer,
                    None => fetch_tokenizer(&mut link, &welcome).await?,
                };
                anyhow::Ok((welcome, tokenizer))
            };
            match attempt.await {
                Ok(done) => return Ok(done),
                Err(error) if refusals.are_final(&error) => return Err(error),
                Err(error) => waiting(&error),
            }
            tokio::time::sleep(Duration::from_secs_f64(pause)).await;
            pause = f64::min(pause * 1.5, RETRY_SECONDS_MAX);
        }
    }
}

/// Keeps a connection alive until the site is refused or the clerk has hung up.
pub(super) async fn keep_connected(
    route: Route,
    mut commands: mpsc::UnboundedReceiver<Command>,
    inbox: Sender<Incoming>,
) {
    let mut pause = 0.1;
    let (mut told, mut refusals) = (None, Refusals::default());
    let (fetches, mut joins) = (Fetches::default(), true);
    loop {
        match connect(&route).await {
            Ok((control, data)) => {
                (pause, refusals) = (0.1, Refusals::default());
                if inbox.send(Incoming::Connected).is_err() {
                    return;
                }
                let end = talk(control, data, &mut commands, &inbox, &fetches, &route, joins).await;
                joins = false;
                if end.as_ref().is_err_and(anyhow::Error::is::<Silence>) {
                    route.way.doors.try_another();
                }
                route.meter.disconnected();
                lock(&fetches).retain(|_, fetch| fetch.is_worth_resuming());
                if inbox.send(Incoming::Disconnected).is_err() || matches!(end, Ok(())) {
                    return;
                }
                tracing::warn!("the connection to the coordinator is lost; training goes on");
            }
            Err(error) if refusals.are_final(&error) => {
                let _ = inbox.send(Incoming::Refused(error.to_string()));
                return;
            }
            Err(error) => {
                if told.is_none_or(|told: Instant| told.elapsed() > Duration::from_secs(60)) {
                    told = Some(Instant::now());
                    tracing::warn!(
                        "{error:#}; trying on (Ctrl-C stops the site; if the run is over, nobody will answer)"
                    );
                }
            }
        }
        tokio::time::sleep(Duration::from_secs_f64(pause)).await;
        pause = f64::min(pause * 1.5, RETRY_SECONDS_MAX);
        // What was meant for the lost connection would only mislead the next.
        while commands.try_recv().is_ok() {}
    }
}

async fn connect(route: &Route) -> Result<(Link, Vec<Link>)> {
    let (control, _) = route.way.greet(Purpose::Control).await?;
    let mut data = Vec::new();
    for _ in 0..route.streams.max(1) {
        data.push(route.way.greet(Purpose::Data).await?.0);
    }
    Ok((control, data))
}

/// A piece of a payload to move.
#[derive(Debug, Clone)]
enum Work {
    Put { digest: Digest, bytes: Arc<Vec<u8>>, offset: usize },
    Get(Piece),
}

type Fetches = Arc<Mutex<BTreeMap<Digest, Fetch>>>;

/// Bytes of which some are here. They outlast a connection: what has arrived is not asked for again.
struct Fetch {
    buffer: Parcel,
    here: Ranges,
    /// Whether the clerk waits for it; else it is being pushed.
    wanted: bool,
    /// Whose weights they are, with the file that gets them too.
    weights: Option<(FragmentId, Partial)>,
    /// Bytes that came over other connections than the usual ones, and whether others than the leader gave some.
    aside: u64,
    is_donated: bool,
}

/// Over which connection bytes have come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Origin {
    /// A data connection, whose speed is measured.
    Usual,
    /// One that the leader gives weights over, and that ends with the fetch.
    Aside,
    /// One from a coordinator that stands by.
    Donor,
}

/// A fetch of which less has come is begun anew when its connection is lost.
const RESUME_BYTES: u64 = 256 << 10;
/// Fetches and pushes that may be incomplete at a time; a coordinator that begins more is not sound.
const FETCHES_MAX: usize = 1 << 13;

impl Fetch {
    fn new(buffer: Parcel) -> Self {
        Self { buffer, here: Ranges::new(), wanted: false, weights: None, aside: 0, is_donated: false }
    }

    /// A fetch that goes on where an earlier process has stopped.
    fn go_on(bytes: usize, arriving: &Arriving, weights: Weights) -> Self {
        let mut fetch = Self::new(Parcel::of_weights(bytes));
        let partial = arriving.go_on(weights, fetch.buffer.as_mut_bytes(), &mut fetch.here);
        Self { weights: Some((weights.fragment, partial)), ..fetch }
    }

    fn put(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        let start = usize::try_from(offset)?;
        let end = start.checked_add(bytes.len()).filter(|&end| end <= self.buffer.len());
        let end = end.ok_or_else(|| anyhow!("the coordinator sent bytes that nobody asked for"))?;
        self.buffer.as_mut_bytes()[start..end].copy_from_slice(bytes);
        if let Some((_, file)) = self.weights.as_mut().filter(|_| !self.here.contains_span(offset, end as u64)) {
            file.add(offset, bytes);
        }
        self.here.insert_span(offset, end as u64);
        Ok(())
    }

    /// What the clerk is told when the last bytes have come.
    fn into_news(self, digest: Digest) -> Incoming {
        let Self { buffer, wanted, weights, .. } = self;
        match (wanted, Digest::of(buffer.as_bytes()) == digest) {
            (true, true) => Incoming::Fetched(digest, Some(buffer)),
            (false, true) => Incoming::Pushed(digest, buffer.into_bytes()),
            (_, false) => {
                weights.into_iter().for_each(|(_, mut file)| file.give_up());
                Incoming::Fetched(digest, None)
            }
        }
    }

    fn is_whole(&self) -> bool {
        self.here.contains_span(0, self.buffer.len() as u64)
    }

    fn is_worth_resuming(&self) -> bool {
        self.here.len() >= RESUME_BYTES
    }

    /// Stretches of at most [`CHUNK`] bytes that are not here.
    fn missing(&self) -> Vec<(u64, u32)> {
        let total = self.buffer.len() as u64;
        let stretches = (0..total).step_by(CHUNK).map(|offset| (offset, (total - offset).min(CHUNK as u64) as u32));
        stretches.filter(|(offset, len)| !self.here.contains_span(*offset, offset + u64::from(*len))).collect()
    }
}

/// The coordinator says nothing any more.
#[derive(Debug, thiserror::Error)]
#[error("the coordinator does not answer any more")]
struct Silence;

/// Runs all connections until one breaks (an error) or the clerk hangs up.
async fn talk(
    control: Link,
    data: Vec<Link>,
    commands: &mut mpsc::UnboundedReceiver<Command>,
    inbox: &Sender<Incoming>,
    fetches: &Fetches,
    route: &Route,
    joins: bool,
) -> Result<()> {
    let (work, queue) = mpsc::unbounded_channel();
    let pile = Arc::new(Pile::default());
    let stream = Stream {
        queue: Arc::new(tokio::sync::Mutex::new(queue)),
        pile: pile.clone(),
        fetches: fetches.clone(),
        inbox: inbox.clone(),
        window: Arc::new(Window::new(GETS_AT_FIRST, GETS_AHEAD * data.len())),
        largest: route.largest,
        meter: route.meter.clone(),
        suspicion: route.suspicion.clone(),
    };
    let meter = &route.meter;
    let mut helpers = JoinSet::new();
    for donor in route.donors() {
        helpers.spawn(donor.ask(stream.clone(), joins));
    }
    let mut streams = JoinSet::new();
    for link in data {
        streams.spawn(stream.clone().carry(link));
    }
    let (mut reader, mut writer) = tokio::io::split(control);
    let read = async {
        let mut longest = 0.0f64;
        loop {
            // Every status is answered, and one is sent every second.
            let (began, patience) = (Instant::now(), Duration::from_secs_f64(route.way.doors.patience(longest)));
            let answer = tokio::time::timeout(patience, read_frame(&mut reader)).await.map_err(|_| Silence)?;
            longest = began.elapsed().as_secs_f64().max(longest * (1.0 - FORGETTING));
            match answer? {
                Some(Frame::Standing(standing)) => {
                    meter.answered(standing.heard);
                    told::note(&standing);
                    standing.successor.into_iter().for_each(|next| route.way.expect(next));
                    tell(inbox, Incoming::Standing(standing));
                }
                _ => bail!("the coordinator hung up"),
            }
        }
    };
    let write = async {
        let mut last: Option<Frame> = None;
        loop {
            let pause = tokio::time::sleep(Duration::from_secs(REPEAT_SECONDS));
            let command = tokio::select! {
                command = commands.recv() => command,
                () = pause => {
                    if let Some(frame) = &last {
                        write_frame(&mut writer, frame).await?;
                    }
                    continue;
                }
            };
            match command {
                None => return anyhow::Ok(()),
                Some(Command::Report(status)) => {
                    meter.asked(status.number);
                    let frame = Frame::Status(status);
                    write_frame(&mut writer, &frame).await?;
                    last = Some(frame);
                }
                Some(Command::Upload(digest, bytes)) => {
                    meter.sending(digest, bytes.len() as u64);
                    for offset in (0..bytes.len()).step_by(CHUNK) {
                        work.send(Work::Put { digest, bytes: bytes.clone(), offset })?;
                    }
                }
                Some(Command::Fetch(digest, bytes, weights)) => {
                    let weights = weights.map(|(fragment, version)| Weights { fragment, version, digest });
                    want(fetches, digest, usize::try_from(bytes)?, weights, &route.arriving);
                    if let Some(whole) = take_whole(fetches, digest) {
                        tell(inbox, whole.into_news(digest));
                    }
                    let pieces = missing(fetches, digest);
                    if weights.is_some() {
                        pile.retain(|digest| lock(fetches).contains_key(digest));
                        pile.add(pieces);
                    } else {
                        pieces.into_iter().try_for_each(|piece| work.send(Work::Get(piece)))?;
                    }
                }
            }
        }
    };
    tokio::select! {
        result = read => return result,
        result = write => result?,
        Some(result) = streams.join_next() => return result?.and_then(|()| bail!("a data connection ended")),
    }
    // A connection that is closed with something unread is reset, and what was said last may be lost with it.
    writer.shutdown().await?;
    tokio::io::copy(&mut reader, &mut tokio::io::sink()).await?;
    Ok(())
}

/// Tells the clerk. One that has stopped has no use for it, and ends nothing here: its last words may still wait to be sent.
fn tell(inbox: &Sender<Incoming>, incoming: Incoming) {
    let _ = inbox.send(incoming);
}

/// Notes that some bytes are wanted.
fn want(fetches: &Fetches, digest: Digest, bytes: usize, weights: Option<Weights>, arriving: &Arriving) {
    let mut fetches = lock(fetches);
    if let Some(Weights { fragment, .. }) = weights {
        // An older version that was not fetched to the end is not wanted any more.
        fetches.retain(|at, fetch| *at == digest || fetch.weights.as_ref().is_none_or(|(of, _)| *of != fragment));
    }
    let begin = || match weights {
        Some(weights) if bytes as u64 >= RESUME_BYTES => Fetch::go_on(bytes, arriving, weights),
        Some(_) => Fetch::new(Parcel::of_weights(bytes)),
        None => Fetch::new(Parcel::of_bytes(bytes)),
    };
    let fetch = fetches.entry(digest).or_insert_with(begin);
    if fetch.buffer.len() != bytes {
        *fetch = begin();
    }
    fetch.wanted = true;
}

/// What must be asked for.
fn missing(fetches: &Fetches, digest: Digest) -> Vec<Piece> {
    let missing = lock(fetches).get(&digest).map_or_else(Vec::new, Fetch::missing);
    missing.into_iter().map(|(offset, length)| Piece { digest, offset, length }).collect()
}

/// Takes a fetch of which everything is here.
fn take_whole(fetches: &Fetches, digest: Digest) -> Option<Fetch> {
    let mut fetches = lock(fetches);
    if fetches.get(&digest)?.is_whole() { fetches.remove(&digest) } else { None }
}

/// One data connection: takes work from the common queue and the pile, so that a slow stream takes less of it.
#[derive(Clone)]
pub(super) struct Stream {
    queue: Arc<tokio::sync::Mutex<mpsc::UnboundedReceiver<Work>>>,
    /// Weights, for donors too, once the queue is empty.
    pub(super) pile: Arc<Pile>,
    fetches: Fetches,
    inbox: Sender<Incoming>,
    /// For gets over all connections to the leader.
    window: Arc<Window>,
    /// Bytes of the largest fragment's weights.
    pub(super) largest: usize,
    meter: Meter,
    suspicion: Suspicion,
}

impl Stream {
    async fn carry(self, link: Link) -> Result<()> {
        let (mut reader, mut writer) = tokio::io::split(link);
        let write = async {
            loop {
                // Wait for room first, so that a stalled stream leaves the work to the others.
                let Some((work, room)) = self.next().await else { return anyhow::Ok(()) };
                if let Some(room) = room {
                    self.window.ask(room, Instant::now());
                }
                write_frame(&mut writer, &work.frame()).await?;
            }
        };
        let read = async {
            while let Some(frame) = read_frame(&mut reader).await? {
                self.take(frame)?;
            }
            bail!("a data connection ended")
        };
        tokio::select! { result = write => result, result = read => result }
    }

    /// The next thing to do over a connection to the leader; with room, if it is a get.
    async fn next(&self) -> Option<(Work, Option<SemaphorePermit<'_>>)> {
        let queued = async { self.queue.lock().await.recv().await };
        let piled = self.pile.take(&self.window, |_| true);
        let work = tokio::select! {
            biased;
            work = queued => work?,
            (room, piece) = piled => return Some((Work::Get(piece), Some(room))),
        };
        let room = if matches!(work, Work::Get(_)) { Some(self.window.room().await) } else { None };
        Some((work, room))
    }

    fn take(&self, frame: Frame) -> Result<()> {
        match frame {
            Frame::Chunk { digest, offset, bytes } => {
                self.window.answered(Instant::now());
                self.arrive(digest, offset, &bytes, Origin::Usual)
            }
            Frame::Put { digest, total, offset, bytes } => {
                self.expect(digest, total)?;
                self.arrive(digest, offset, &bytes, Origin::Usual)
            }
            Frame::Missing(digest) => {
                self.window.answered(Instant::now());
                if !self.lack(digest) {
                    tell(&self.inbox, Incoming::Uploaded(digest, false));
                }
                Ok(())
            }
            Frame::Have(digest) => {
                self.meter.sent(digest);
                tell(&self.inbox, Incoming::Uploaded(digest, true));
                Ok(())
            }
            _ => bail!("a data connection carries payloads"),
        }
    }

    /// Bytes of weights that are still missing.
    pub(super) fn weights_to_come(&self) -> u64 {
        let fetches = lock(&self.fetches);
        let wanted = fetches.values().filter(|fetch| fetch.wanted && fetch.weights.is_some());
        wanted.map(|fetch| fetch.buffer.len() as u64 - fetch.here.len()).sum()
    }

    /// Makes room for bytes that are sent unasked.
    fn expect(&self, digest: Digest, total: u64) -> Result<()> {
        let mut fetches = lock(&self.fetches);
        let total = usize::try_from(total)?;
        if total > self.largest || fetches.len() >= FETCHES_MAX {
            bail!("the coordinator sends more than a commit can be");
        }
        fetches.entry(digest).or_insert_with(|| Fetch::new(Parcel::of_bytes(total)));
        Ok(())
    }

    /// Whether bytes of that address are still to come.
    pub(super) fn wants(&self, digest: Digest) -> bool {
        lock(&self.fetches).contains_key(&digest)
    }

    /// The leader does not have what is fetched: nobody asks for more of it, and the clerk is told. False if nobody waited for it.
    pub(super) fn lack(&self, digest: Digest) -> bool {
        self.pile.retain(|at| *at != digest);
        let was_fetch = lock(&self.fetches).remove(&digest).is_some();
        if was_fetch {
            tell(&self.inbox, Incoming::Fetched(digest, None));
        }
        was_fetch
    }

    /// Adds bytes; tells the clerk when the last have come.
    pub(super) fn arrive(&self, digest: Digest, offset: u64, bytes: &[u8], origin: Origin) -> Result<()> {
        if let Some(fetch) = lock(&self.fetches).get_mut(&digest) {
            fetch.put(offset, bytes)?;
            match origin {
                Origin::Usual => self.meter.receiving(digest, bytes.len() as u64),
                Origin::Aside | Origin::Donor => fetch.aside += bytes.len() as u64,
            }
            fetch.is_donated |= origin == Origin::Donor;
        }
        let Some(whole) = take_whole(&self.fetches, digest) else { return Ok(()) };
        self.meter.received(digest, (whole.buffer.len() as u64).saturating_sub(whole.aside));
        let is_donated = whole.is_donated;
        let news = whole.into_news(digest);
        if is_donated && matches!(news, Incoming::Fetched(_, None)) {
            self.suspicion.raise();
        }
        tell(&self.inbox, news);
        Ok(())
    }
}

impl Work {
    fn frame(&self) -> Frame {
        match self {
            Work::Put { digest, bytes, offset } => {
                let end = bytes.len().min(offset + CHUNK);
                Frame::Put {
                    digest: *digest,
                    total: bytes.len() as u64,
                    offset: *offset as u64,
                    bytes: bytes[*offset..end].to_vec(),
                }
            }
            Work::Get(piece) => piece.get(),
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A stream without connections that waits for so many bytes of weights of that address, and what the clerk is told.
    pub(in super::super) fn fetching(digest: Digest, bytes: usize) -> (Stream, std::sync::mpsc::Receiver<Incoming>) {
        let (inbox, told) = std::sync::mpsc::channel();
        let stream = Stream {
            queue: Arc::new(tokio::sync::Mutex::new(mpsc::unbounded_channel().1)),
            pile: Arc::default(),
            fetches: Fetches::default(),
            inbox,
            window: Arc::new(Window::new(1, 1)),
            largest: bytes,
            meter: Meter::default(),
            suspicion: Suspicion::default(),
        };
        lock(&stream.fetches).insert(digest, Fetch { wanted: true, ..Fetch::new(Parcel::of_weights(bytes)) });
        (stream, told)
    }

    /// What comes over other connections tells nothing about the usual ones, and a leader's damage nothing about donors.
    #[test]
    fn bytes_are_told_apart_by_where_they_come_from() {
        let weights = [1u8, 2, 3, 4];
        for (last, damaged) in
            [(Origin::Aside, false), (Origin::Aside, true), (Origin::Donor, false), (Origin::Donor, true)]
        {
            let digest = Digest::of(if damaged { b"else" } else { &weights });
            let (stream, told) = fetching(digest, 4);
            stream.arrive(digest, 0, &weights[..2], Origin::Usual).unwrap();
            stream.arrive(digest, 2, &weights[2..], last).unwrap();
            let Ok(Incoming::Fetched(_, parcel)) = told.try_recv() else { panic!("nothing is told") };
            assert_eq!(parcel.map(|parcel| parcel.as_bytes().to_vec()), (!damaged).then(|| weights.to_vec()));
            assert_eq!(stream.suspicion.is_raised(), damaged && last == Origin::Donor);
        }
    }
}
