//! Who leads. A world has one coordinator, which starts again where it was, or two that have the run in an object store: one
//! leads, the other stands by, and either may be killed, or paused and go on as if nothing had been.

use atoll_core::hash::Digest;
use atoll_core::journal::Entry;
use atoll_core::round::Event;
use atoll_core::site::Time;
use atoll_core::vigil::Vigil;

use super::World;
use super::coordinator::Head;
use super::disk::Append;
use super::happening::Happening;

/// A place at which a coordinator is, or is not.
#[derive(Default)]
pub(super) struct Post {
    pub(super) duty: Duty,
    /// Counts the lives of its processes.
    pub(super) life: u64,
    /// When it has asked to be woken, by its own clock.
    pub(super) wakes: Time,
    /// Until when it is paused.
    paused: Time,
    /// How far its clock is ahead.
    ahead: f64,
}

/// What a coordinator does.
#[derive(Default)]
pub(super) enum Duty {
    /// Nothing: it is dead.
    #[default]
    None,
    /// It watches whoever leads; whether it has made up its mind to lead.
    Waits(Vigil, bool),
    /// It leads.
    Leads(Box<Head>),
}

/// Longest pause of a coordinator, in seconds.
const PAUSE_MAX: f64 = 12.0;
/// Seconds of silence after which a site looks for another coordinator, and as many more by chance.
const SILENCE: f64 = 3.0;
/// Clocks of different machines, and of the same after a restart, differ by up to so many seconds.
const CLOCKS_APART: f64 = 1e6;

impl Post {
    pub(super) fn head(&self) -> Option<&Head> {
        if let Duty::Leads(head) = &self.duty { Some(head) } else { None }
    }

    pub(super) fn head_mut(&mut self) -> Option<&mut Head> {
        if let Duty::Leads(head) = &mut self.duty { Some(head) } else { None }
    }

    /// What its clock says.
    pub(super) fn clock(&self, now: Time) -> Time {
        now.after(self.ahead)
    }
}

impl World<'_> {
    /// Whoever leads now, if somebody does: who thinks so in the latest epoch.
    pub(super) fn leader(&self) -> Option<(usize, &Head)> {
        let heads = self.posts.iter().enumerate().filter_map(|(post, at)| Some((post, at.head()?)));
        heads.max_by_key(|(_, head)| head.machine.book().epoch)
    }

    fn is_pair(&self) -> bool {
        self.posts.len() > 1
    }

    /// Seconds until the coordinator that this is for is not paused any more.
    pub(super) fn pause_of(&self, happening: &Happening) -> Option<f64> {
        let post = match happening {
            Happening::CoordinatorTick(post, _)
            | Happening::CoordinatorWakes(post, _)
            | Happening::Claim(post, ..)
            | Happening::Merged(post, ..)
            | Happening::Tried(post, ..) => *post,
            Happening::Status(index, connection, _)
            | Happening::Payload(index, connection, ..)
            | Happening::Request(index, connection, _)
                if self.linked(*index, *connection) =>
            {
                self.sites[*index].post?
            }
            _ => return None,
        };
        let paused = self.posts[post].paused;
        (paused > self.now).then(|| paused.seconds_since(self.now) + 0.001)
    }

    /// A coordinator's process starts: the only one leads, one of two looks who does.
    pub(super) fn start_coordinator(&mut self, post: usize) -> Result<(), String> {
        self.posts[post].life += 1;
        let life = self.posts[post].life;
        self.after(0.0, Happening::CoordinatorTick(post, life));
        if !self.is_pair() {
            return self.lead(post);
        }
        self.posts[post].ahead = self.chance.unit() * CLOCKS_APART;
        self.posts[post].duty = Duty::Waits(Vigil::default(), false);
        Ok(())
    }

    /// What a coordinator does a few times a second.
    pub(super) fn tick(&mut self, post: usize) -> Result<(), String> {
        let (entries, beats, is_full) = (self.disk.entries, self.disk.beats, self.disk.is_full(self.now));
        let now = self.posts[post].clock(self.now);
        match &mut self.posts[post].duty {
            Duty::None => Ok(()),
            Duty::Leads(head) if head.entries != entries => self.depose(post),
            Duty::Leads(_) => {
                self.disk.beats += u64::from(!is_full);
                self.tell_coordinator(post, Event::Tick)
            }
            Duty::Waits(_, true) => Ok(()),
            Duty::Waits(vigil, claims) => {
                vigil.look(now, beats);
                let (leader, me) = (self.witness.leader(), name(post));
                if vigil.is_over() || leader == Some(me) || (leader.is_none() && post == 0) {
                    *claims = true;
                    // The store answers when it does, and something may come before that.
                    let (seconds, life) = (self.chance.unit() * 0.4, self.posts[post].life);
                    self.after(seconds, Happening::Claim(post, life, entries));
                }
                Ok(())
            }
        }
    }

    /// A standby wants to lead from behind so many entries on.
    pub(super) fn claim(&mut self, post: usize, entries: usize) -> Result<(), String> {
        if self.disk.entries != entries {
            self.posts[post].duty = Duty::Waits(Vigil::default(), false);
            return Ok(()); // Somebody was faster, or the leader lives after all.
        }
        let (book, ..) = self.replay()?;
        let leads = Entry::Leads { epoch: book.epoch + 1, holder: name(post) };
        let appended = self.disk.append(self.now, &leads);
        if self.disk.entries > entries {
            self.witness.see_author(&leads, book.epoch)?;
        }
        match appended {
            Append::Done => self.lead(post),
            Append::Failed => {
                self.posts[post].duty = Duty::Waits(Vigil::default(), false);
                Ok(())
            }
        }
    }

    /// A coordinator has found that another leads: its process ends, and whoever looks after it starts it again.
    pub(super) fn depose(&mut self, post: usize) -> Result<(), String> {
        self.crash_coordinator(post)
    }

    pub(super) fn crash_coordinator(&mut self, post: usize) -> Result<(), String> {
        let was_leading = self.posts[post].head().is_some();
        self.posts[post].duty = Duty::None;
        self.posts[post].paused = Time::default();
        self.posts[post].life += 1;
        for index in 0..self.sites.len() {
            if !self.is_pair() || (was_leading && self.sites[index].post == Some(post)) {
                self.disconnect(index)?;
                self.look_for_another(index);
            }
        }
        let delay = 0.5 + 5.0 * self.chance.unit();
        self.after(delay, Happening::CoordinatorStarts(post));
        Ok(())
    }

    /// A coordinator stands still, and then goes on as if nothing had been.
    pub(super) fn pause_coordinator(&mut self, post: usize) {
        self.posts[post].paused = self.now.after(self.chance.unit() * PAUSE_MAX);
        for index in 0..self.sites.len() {
            if self.sites[index].post == Some(post) {
                let seconds = SILENCE * (1.0 + self.chance.unit());
                self.after(seconds, Happening::Doubt(index, self.sites[index].connection));
            }
        }
    }

    /// A site has heard nothing for a while.
    pub(super) fn doubt(&mut self, index: usize) -> Result<(), String> {
        let is_silent = |post: usize| self.posts[post].paused > self.now;
        if self.sites[index].post.is_some_and(is_silent) {
            self.disconnect(index)?;
            self.look_for_another(index);
        }
        Ok(())
    }

    /// One of two coordinators may lead any time; the only one calls everybody when it starts.
    fn look_for_another(&mut self, index: usize) {
        if self.is_pair() {
            let seconds = 0.2 + self.chance.unit();
            self.after(seconds, Happening::Reconnect(index, self.sites[index].life));
        }
    }

    /// A coordinator that answers a site: it thinks that it leads, and the site knows of no later epoch.
    pub(super) fn open_door(&mut self, index: usize) -> Option<usize> {
        let first = if self.is_pair() { self.chance.below(2) as usize } else { 0 };
        for post in [first, 1 - first].into_iter().take(self.posts.len()) {
            let Some(head) = self.posts[post].head() else { continue };
            let epoch = head.machine.book().epoch;
            if self.posts[post].paused <= self.now && epoch >= self.sites[index].epoch {
                self.sites[index].epoch = epoch;
                return Some(post);
            }
        }
        self.look_for_another(index);
        None
    }
}

/// By which a post knows that it was the last to lead.
fn name(post: usize) -> Digest {
    Digest::of(&[post as u8])
}
