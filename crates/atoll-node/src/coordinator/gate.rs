//! The coordinator's side of each connection: greeting, then either status and standing (control) or
//! payloads (data). Every connection is a task of its own; what they learn goes to the heart.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, bail};
use atoll_core::codec::Payload;
use atoll_core::hash::Digest;
use atoll_core::round::{Seen, Status};
use atoll_core::site::SiteId;
use atoll_core::wire::{Answer, CHUNK, Frame, Hello, PROTOCOL, Purpose, Request, Welcome};
use tokio::io::WriteHalf;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot, watch as signal};
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;

use super::arriving::{Added, Arriving};
use super::lobby::{Lobby, Place};
use super::outgoing::{Outgoings, Piece};
use super::shelf::{Bytes, Shelf, lock};
use crate::crew::Crew;
use crate::link::{Gate, Link, SILENCE_SECONDS, Traffic, read_frame, read_greeting, within, write_frame};
use crate::shared::Shared;
use crate::store::Store;

/// What connections tell the heart.
pub(super) enum Input {
    Knock(Knock),
    Connected {
        site: SiteId,
        link: u64,
        outbox: mpsc::Sender<Frame>,
    },
    Heard {
        site: SiteId,
        link: u64,
        status: Box<Status>,
    },
    Gone {
        site: SiteId,
        link: u64,
    },
    /// A payload of this site is kept.
    Arrived(SiteId, Digest, Seen),
    /// What a site sent under that name is no payload, for this reason.
    Useless(SiteId, Digest, String),
    /// Somebody wants to know or to do something.
    Asked {
        site: SiteId,
        key: Digest,
        request: Request,
        reply: oneshot::Sender<Answer>,
    },
}

/// Somebody wants to come in.
pub(super) struct Knock {
    pub(super) key: Digest,
    pub(super) hello: Hello,
    pub(super) traffic: Arc<Traffic>,
    pub(super) reply: oneshot::Sender<Result<Welcome, String>>,
}

/// What every connection needs.
pub(super) struct House {
    pub(super) gate: Gate,
    pub(super) inputs: mpsc::Sender<Input>,
    pub(super) shelf: Arc<Shelf>,
    pub(super) store: Store,
    /// The run's object store, if it has one.
    pub(super) shared: Option<Arc<Shared>>,
    /// Weights of each fragment.
    pub(super) fragment_lens: Vec<usize>,
    /// Payloads that are under way from sites.
    pub(super) arriving: Arriving,
    pub(super) links: AtomicU64,
    /// Who has not shown a key that is known.
    pub(super) lobby: Arc<Lobby>,
    /// Connections of each site.
    pub(super) rooms: Rooms,
    /// What is to be sent to each site.
    pub(super) outgoings: Arc<Outgoings>,
    /// Keys that are off the list: their connections end.
    pub(super) off_the_list: signal::Receiver<BTreeSet<Digest>>,
    /// Bytes that were given to those who came for nothing else.
    pub(super) given: Arc<AtomicU64>,
}

/// Frames that may wait for a slow reader; further standings are dropped, since the next says it all.
const OUTBOX: usize = 64;

/// Connections that a site may have; ours have one and as many as their `--streams`, and as many again while they
/// fetch weights, if there is room.
const CONNECTIONS_MAX: usize = 64;

/// How many connections each site has.
#[derive(Clone, Default)]
pub(super) struct Rooms(Arc<Mutex<BTreeMap<SiteId, usize>>>);

/// One connection of a site, until it is dropped.
struct Room(Rooms, SiteId);

impl Rooms {
    fn take(&self, site: &SiteId) -> Option<Room> {
        let mut rooms = lock(&self.0);
        let taken = rooms.entry(site.clone()).or_default();
        *taken += 1;
        // A room that is none is given back at once.
        let room = Room(self.clone(), site.clone());
        let is_full = *taken > CONNECTIONS_MAX;
        drop(rooms);
        (!is_full).then_some(room)
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        let mut rooms = lock(&self.0.0);
        if let Some(taken) = rooms.get_mut(&self.1) {
            *taken -= 1;
            if *taken == 0 {
                rooms.remove(&self.1);
            }
        }
    }
}

/// Takes connections until the task is dropped, and they with it.
pub(super) async fn serve(house: Arc<House>, listener: TcpListener) {
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = connections.join_next() => continue,
        };
        match accepted {
            Ok((tcp, from)) => {
                let (house, place) = (house.clone(), house.lobby.enter(from.ip()));
                connections.spawn(async move {
                    if let Err(error) = receive(&house, tcp, place).await {
                        tracing::debug!("connection from {from}: {error:#}");
                    }
                });
            }
            Err(error) => {
                tracing::warn!("no connection could be taken: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn receive(house: &Arc<House>, tcp: TcpStream, place: Place) -> Result<()> {
    let guest = tokio::select! {
        guest = let_in(house, tcp) => guest?,
        () = place.lost() => bail!("it took so long to show a key that another got its place"),
    };
    drop(place);
    let Some((mut link, purpose, key, welcome)) = guest else { return Ok(()) };
    let site = welcome.site.clone();
    let Some(_room) = house.rooms.take(&site) else {
        return refuse(
            &mut link,
            format!("{site} has {CONNECTIONS_MAX} connections already\nhint: use fewer --streams"),
        )
        .await;
    };
    if purpose == Purpose::Control {
        house.outgoings.open(&site); // Before the site learns that it may open data connections.
    }
    write_frame(&mut link, &Frame::Welcome(Box::new(welcome))).await?;
    let mut off_the_list = house.off_the_list.clone();
    let serve = async {
        match purpose {
            Purpose::Control => control(house, site.clone(), link).await,
            Purpose::Data | Purpose::Enlist => data(house, &site, link).await,
            Purpose::Desk => desk(house, &site, key, link).await,
            Purpose::Fetch => hand_out(house, link).await,
        }
    };
    tokio::select! {
        result = serve => result,
        Ok(_) = off_the_list.wait_for(|keys| keys.contains(&key)) => bail!("the key of {site} is off the list"),
    }
}

/// Who was let in: over which connection, what for, with which key.
type Guest = (Link, Purpose, Digest, Welcome);

/// Sees to it that the peer belongs to the run; none if it was told that it does not.
async fn let_in(house: &House, tcp: TcpStream) -> Result<Option<Guest>> {
    let (mut link, key) = house.gate.accept(tcp).await?;
    let greeting = within(SILENCE_SECONDS, read_greeting(&mut link)).await??;
    let hello = match greeting {
        Some(Frame::Hello { hello: Some(hello), .. }) => hello,
        Some(Frame::Hello { protocol, hello: None }) => {
            let newer = if protocol > PROTOCOL { "the coordinator's Atoll" } else { "the site's Atoll" };
            let why = format!(
                "the site speaks protocol {protocol}, the coordinator {PROTOCOL}\nhint: bring {newer} up to the other's version"
            );
            return refuse(&mut link, why).await.map(|()| None);
        }
        _ => bail!("the first frame was no greeting"),
    };
    let (reply, answer) = oneshot::channel();
    let traffic = link.get_ref().0.traffic.clone();
    let purpose = hello.purpose;
    house.inputs.send(Input::Knock(Knock { key, hello, traffic, reply })).await.map_err(|_| closed())?;
    match answer.await.map_err(|_| anyhow!("it came for what is not done here"))? {
        Ok(welcome) => Ok(Some((link, purpose, key, welcome))),
        Err(why) => refuse(&mut link, why).await.map(|()| None),
    }
}

fn closed() -> anyhow::Error {
    anyhow!("the coordinator is stopping")
}

async fn refuse(link: &mut Link, why: String) -> Result<()> {
    tracing::info!("turned away: {}", why.lines().next().unwrap_or_default());
    write_frame(link, &Frame::Refused(why)).await?;
    use tokio::io::AsyncWriteExt;
    link.shutdown().await?;
    Ok(())
}

async fn control(house: &Arc<House>, site: SiteId, link: Link) -> Result<()> {
    let number = house.links.fetch_add(1, Ordering::Relaxed) + 1;
    // What an earlier connection left half sent will be sent again.
    house.arriving.drop_all(&site);
    let (outbox, mut frames) = mpsc::channel(OUTBOX);
    let (mut reader, mut writer) = tokio::io::split(link);
    house.inputs.send(Input::Connected { site: site.clone(), link: number, outbox }).await.map_err(|_| closed())?;
    let write = async {
        while let Some(frame) = frames.recv().await {
            write_frame(&mut writer, &frame).await?;
        }
        anyhow::Ok(()) // A newer connection of this site has taken over.
    };
    let read = async {
        // A living site says something every second.
        while let Some(frame) = within(SILENCE_SECONDS, read_frame(&mut reader)).await?? {
            let Frame::Status(status) = frame else { bail!("a control connection carries statuses") };
            house.inputs.send(Input::Heard { site: site.clone(), link: number, status }).await.map_err(|_| closed())?;
        }
        anyhow::Ok(())
    };
    let result = hear_out(write, read).await;
    let _ = house.inputs.send(Input::Gone { site, link: number }).await;
    result
}

/// Talks and listens until there is nothing more to hear, or nothing more is to be said. That a site takes no more words
/// ends nothing: its own last ones, that it leaves, may still wait to be read.
async fn hear_out(write: impl Future<Output = Result<()>>, read: impl Future<Output = Result<()>>) -> Result<()> {
    tokio::pin!(read);
    let written = tokio::select! { result = &mut read => return result, result = write => result };
    if written.is_err() { read.await } else { Ok(()) }
}

async fn data(house: &Arc<House>, site: &SiteId, link: Link) -> Result<()> {
    // A site that only enlists has no control connection.
    if house.outgoings.of(site).is_none() {
        house.outgoings.open(site);
    }
    let outgoing = house.outgoings.of(site).ok_or_else(closed)?;
    let (mut reader, mut writer) = tokio::io::split(link);
    let write = async {
        loop {
            let frame = match outgoing.next().await? {
                Piece::Say(frame) => frame,
                Piece::Push { digest, bytes, offset } => Piece::put(digest, &bytes, offset),
                Piece::Answer { digest, offset, length } => look_up(house, digest, offset, length).await?,
            };
            write_frame(&mut writer, &frame).await?;
        }
    };
    let read = async {
        while let Some(frame) = read_frame(&mut reader).await? {
            match frame {
                Frame::Get { digest, offset, length } => {
                    // They are made, if they must be, while what was asked for before is being sent.
                    match fetch(house, digest).await? {
                        Some(_) => outgoing.answer(Piece::Answer { digest, offset, length })?,
                        None => outgoing.say(Frame::Missing(digest))?,
                    }
                }
                Frame::Put { digest, total, offset, bytes } => {
                    if let Some(answer) = take_in(house, site, digest, total, offset, &bytes).await? {
                        outgoing.say(answer)?;
                    }
                }
                _ => bail!("a data connection carries puts and gets"),
            }
        }
        anyhow::Ok(())
    };
    tokio::select! { result = write => result, result = read => result }
}

/// Answers one question after another.
async fn desk(house: &Arc<House>, site: &SiteId, key: Digest, mut link: Link) -> Result<()> {
    while let Some(frame) = within(SILENCE_SECONDS, read_frame(&mut link)).await?? {
        let answer = match frame {
            Frame::Ask(request) => {
                let (reply, answer) = oneshot::channel();
                let asked = Input::Asked { site: site.clone(), key, request, reply };
                house.inputs.send(asked).await.map_err(|_| closed())?;
                Frame::Answer(answer.await.map_err(|_| closed())?)
            }
            Frame::Get { digest, offset, length } => look_up(house, digest, offset, length).await?,
            _ => bail!("at the desk there are asks and gets"),
        };
        within(SILENCE_SECONDS, write_frame(&mut link, &answer)).await??;
    }
    Ok(())
}

/// A standby is so far behind whoever leads, at most, unless something is wrong: so long it may take to say whether some bytes are here.
const BEHIND: Duration = Duration::from_millis(1500);
/// Between two looks whether they have come.
const LOOK: Duration = Duration::from_millis(50);
/// Questions and gets of one connection that are not answered yet.
const FETCHES_MAX: usize = 256;

/// Answers gets one after the other. One for no bytes asks whether there are any, and its answer may take a moment.
async fn hand_out(house: &Arc<House>, link: Link) -> Result<()> {
    let (mut reader, mut writer) = tokio::io::split(link);
    let (gets, mut asked) = mpsc::channel(FETCHES_MAX);
    let read = async {
        while let Some(frame) = within(SILENCE_SECONDS, read_frame(&mut reader)).await?? {
            let Frame::Get { digest, offset, length } = frame else { bail!("whoever came to fetch may only get") };
            gets.send((digest, offset, length)).await.map_err(|_| closed())?;
        }
        anyhow::Ok(())
    };
    let answer = async {
        let mut expected: Vec<(Digest, Instant)> = Vec::new();
        let mut look = tokio::time::interval(LOOK);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let (digest, offset, length) = tokio::select! {
                get = asked.recv() => get.ok_or_else(closed)?,
                _ = look.tick(), if !expected.is_empty() => {
                    let is_due = |(digest, since): &mut (Digest, Instant)| {
                        house.shelf.at_hand(*digest).is_some() || since.elapsed() > BEHIND
                    };
                    for (digest, _) in expected.extract_if(.., is_due) {
                        give(house, &mut writer, digest, 0, 0).await?;
                    }
                    continue;
                }
            };
            if length == 0 && expected.len() < FETCHES_MAX && fetch(house, digest).await?.is_none() {
                house.shelf.expect(digest);
                expected.push((digest, Instant::now()));
            } else {
                give(house, &mut writer, digest, offset, length).await?;
            }
        }
    };
    tokio::select! { result = read => result, result = answer => result }
}

/// Sends bytes, or says that they are not here.
async fn give(
    house: &Arc<House>,
    writer: &mut WriteHalf<Link>,
    digest: Digest,
    offset: u64,
    length: u32,
) -> Result<()> {
    let answer = look_up(house, digest, offset, length).await?;
    if let Frame::Chunk { bytes, .. } = &answer {
        house.given.fetch_add(bytes.len() as u64, Ordering::Relaxed);
    }
    within(SILENCE_SECONDS, write_frame(writer, &answer)).await?
}

/// The bytes of that address, made or read if they are not at hand; none if they are not here.
async fn fetch(house: &House, digest: Digest) -> Result<Option<Bytes>> {
    match house.shelf.at_hand(digest) {
        Some(bytes) => Ok(Some(bytes)),
        None => {
            let shelf = house.shelf.clone();
            Ok(tokio::task::spawn_blocking(move || shelf.get(digest)).await?)
        }
    }
}

/// The bytes that a site has asked for, or word that they are not here.
async fn look_up(house: &Arc<House>, digest: Digest, offset: u64, length: u32) -> Result<Frame> {
    let bytes = fetch(house, digest).await?;
    let range = |bytes: &Bytes| {
        let start = usize::try_from(offset).ok().filter(|_| length as usize <= CHUNK)?;
        bytes.get(start..start.checked_add(length as usize)?).map(<[u8]>::to_vec)
    };
    Ok(match bytes.as_ref().and_then(range) {
        Some(bytes) => Frame::Chunk { digest, offset, bytes },
        None => Frame::Missing(digest),
    })
}

/// Adds bytes to a payload; when it is whole, checks and keeps it and says so.
async fn take_in(
    house: &Arc<House>,
    site: &SiteId,
    digest: Digest,
    total: u64,
    offset: u64,
    bytes: &[u8],
) -> Result<Option<Frame>> {
    let whole = match house.arriving.add(site, digest, total, offset, bytes) {
        Ok(Added::Part) => return Ok(None),
        Ok(Added::NoRoom) => return Ok(Some(Frame::Missing(digest))),
        Ok(Added::Whole(buffer)) => buffer,
        Err(why) => {
            house.inputs.send(Input::Useless(site.clone(), digest, why.clone())).await.map_err(|_| closed())?;
            bail!("{site} sends what can be no payload: {why}");
        }
    };
    let house_of = house.clone();
    let kept = tokio::task::spawn_blocking(move || keep(&house_of, digest, &whole)).await?;
    let input = match kept? {
        Ok(seen) => Input::Arrived(site.clone(), digest, seen),
        Err(why) => Input::Useless(site.clone(), digest, why),
    };
    house.inputs.send(input).await.map_err(|_| closed())?;
    Ok(Some(Frame::Have(digest)))
}

/// Keeps a payload on disk, and where a standby finds it, and looks at it; or says why it is useless.
fn keep(house: &House, digest: Digest, payload: &[u8]) -> Result<Result<Seen, String>> {
    let seen = match look_at(&house.fragment_lens, digest, payload) {
        Ok(seen) => seen,
        Err(why) => return Ok(Err(why)),
    };
    house.store.put(digest, payload)?;
    if let Some(shared) = &house.shared {
        shared.put_payload(digest, payload)?;
    }
    Ok(Ok(seen))
}

/// What a payload is, or why it is none.
fn look_at(lens: &[usize], digest: Digest, payload: &[u8]) -> Result<Seen, String> {
    if Digest::of(payload) != digest {
        return Err("its bytes are not those that its name promises".to_string());
    }
    let payload = Payload::check_any(payload, lens, &Crew).map_err(|error| error.to_string())?;
    Ok(Seen::of(&payload, &Crew))
}
