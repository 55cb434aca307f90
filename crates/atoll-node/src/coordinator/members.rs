//! Who is let in, and what is done at the desk.

use std::collections::BTreeSet;

use anyhow::Result;
use atoll_core::hash::Digest;
use atoll_core::journal::{Act, Book, Role};
use atoll_core::round::{Event, Order};
use atoll_core::site::SiteId;
use atoll_core::wire::{Answer, Hello, Purpose, Request, Welcome};

use super::Heart;
use super::gate::Knock;
use crate::acts;

impl Heart {
    /// Lets a site in or tells it why not.
    pub(super) fn answer(&mut self, knock: Knock) -> Result<()> {
        self.take_up_acts()?;
        self.carry_out()?; // The peer is told nothing that could yet be forgotten.
        let answer = self.consider(&knock)?;
        let _ = knock.reply.send(answer); // The peer may have hung up meanwhile.
        Ok(())
    }

    fn consider(&mut self, knock: &Knock) -> Result<Result<Welcome, String>> {
        let Hello { purpose, secret, successor, layout, .. } = &knock.hello;
        let now = self.clock.now().0 / 1_000_000;
        let (site, role, entry) = match self.machine.admit(knock.key, secret.map(|secret| Digest::of(&secret)), now) {
            Ok(admitted) => admitted,
            Err(refusal) => return Ok(Err(refusal.to_string())),
        };
        if let Some(entry) = entry {
            self.orders.push(Order::Record(entry));
            self.carry_out()?;
            tracing::info!("{site} was admitted with its ticket, to {role}");
            self.note(serde_json::json!({"event": "admitted", "site": site, "role": role}));
        }
        if role != Role::Train && *purpose != Purpose::Desk {
            return Ok(Err(format!(
                "{site} was not invited to train, but to {role}\nhint: `atoll remote` is for that; to train it takes another ticket"
            )));
        }
        if let Some(layout) = layout.filter(|layout| *layout != self.layout) {
            return Ok(Err(format!(
                "the site's engine has layout {}, the run has {}\nhint: build the engine from the run's own model description",
                layout.short(),
                self.layout.short()
            )));
        }
        if let Some(successor) = *successor {
            self.handle(Event::Rekeyed(site.clone(), knock.key, successor));
            self.carry_out()?;
            if self.machine.book().site_of(successor) != Some(&site) {
                return Ok(Err(format!(
                    "{site} cannot have a key that was known before\nhint: remove site.key.next, and try again"
                )));
            }
        }
        Ok(Ok(self.welcome(site, knock)))
    }

    /// Does what the operator wants done about members.
    pub(super) fn take_up_acts(&mut self) -> Result<()> {
        let pending = acts::pending(&self.dir)?.into_iter().filter(|(path, _)| !self.stuck.contains(path));
        for (path, act) in pending.collect::<Vec<_>>() {
            self.handle(Event::Acted(act, None));
            self.carry_out()?;
            if let Err(error) = acts::done(&path) {
                // It is in the journal, and done again it does nothing.
                if self.stuck.insert(path) {
                    tracing::warn!("{error:#}\nhint: remove it; it has been done");
                }
            }
        }
        Ok(())
    }

    /// What is asked at the desk.
    pub(super) fn serve(&mut self, site: &SiteId, key: Digest, request: Request) -> Result<Answer> {
        let book = self.machine.book();
        // It may have lost its key since it asked.
        if book.site_of(key) != Some(site) || book.is_off_the_list(key) {
            return Ok(Answer::Refused(format!("the key of {site} is off the list\nhint: ask the run's operator")));
        }
        let is_administrator = book.sites.get(site).is_some_and(|member| member.role == Role::Administer);
        let act = match request {
            Request::Look => {
                self.look(self.state());
                return Ok(Answer::Report(serde_json::to_string(&self.watch.report)?));
            }
            Request::Model => {
                return Ok(Answer::Model(book.fragments.iter().map(|fragment| fragment.digest).collect()));
            }
            _ if !is_administrator => {
                let why =
                    format!("{site} may not do that\nhint: it takes a ticket that was made with --role administer");
                return Ok(Answer::Refused(why));
            }
            Request::Invite(ticket, invitation) => Act::Invite(ticket, invitation),
            Request::Revoke(other) => {
                let key = book.sites.get(&other).map(|member| member.key);
                if key.is_none() && !book.is_invited(&other) {
                    return Ok(Answer::Refused(format!("the run knows no site {other}\nhint: look at its status")));
                }
                Act::Revoke(other, key)
            }
        };
        tracing::info!("{site} administers: {act:?}");
        self.handle(Event::Acted(act, Some(site.clone())));
        self.carry_out()?;
        Ok(Answer::Done)
    }
}

/// Keys that were on the list.
pub(super) fn off_the_list(book: &Book) -> BTreeSet<Digest> {
    book.revoked.keys().chain(book.replaced.keys()).copied().collect()
}

/// By which keys coordinators are known to whoever meets the one with the key `own`.
pub(super) fn keys(own: Digest, book: &Book) -> Vec<Digest> {
    let next = book.successor.filter(|next| *next != own);
    [own].into_iter().chain(next).collect()
}
