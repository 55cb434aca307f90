//! Who belongs to the run. A key comes on the list with a ticket, once, and off it when the operator revokes it, for good.
//! A revoked site's contributions are turned down, and its leases go back as soon as no outer step needs them.

use super::{Coordinator, Order};
use crate::hash::Digest;
use crate::journal::{Act, Entry, Role};
use crate::site::SiteId;

/// Why a site may not come in.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The key is on no list and no ticket came with it.
    #[error(
        "this key does not belong to the run\nhint: a site needs its own ticket; the operator prints one with `atoll ticket`"
    )]
    UnknownKey,
    /// The ticket was used by another key.
    #[error(
        "the ticket was already used by another key\nhint: each ticket admits one site once; ask the operator for a new one"
    )]
    TicketUsed,
    /// No ticket of this run has that secret, or it was withdrawn.
    #[error(
        "the ticket is not one of this run's, or was withdrawn\nhint: ask the operator for a new one, `atoll ticket`"
    )]
    UnknownTicket,
    /// The ticket waited too long for its site.
    #[error("the ticket of {0} has expired\nhint: ask the operator for a new one, `atoll ticket`")]
    Expired(SiteId),
    /// The site has another key by now.
    #[error(
        "this key of {0} was replaced by a newer one\nhint: if `atoll remote … rekey` was interrupted here, run it again; else use the folder that has the newer key"
    )]
    Replaced(SiteId),
    /// The operator took the key off the list.
    #[error(
        "the key of {0} was revoked by the run's operator\nhint: only the operator can let this site in again, with a new key and a new ticket"
    )]
    Revoked(SiteId),
    /// The name belongs to another key.
    #[error("the name {0} belongs to a site with another key\nhint: ask the operator for a ticket with another name")]
    NameTaken(SiteId),
}

impl Coordinator {
    /// Which site has this key, and what it may do; with a ticket, of which this is the hash, also lets a new one in. `now` is in
    /// seconds since 1970.
    ///
    /// # Errors
    /// A sentence for the site's operator.
    pub fn admit(
        &mut self,
        key: Digest,
        ticket: Option<Digest>,
        now: u64,
    ) -> Result<(SiteId, Role, Option<Entry>), Refusal> {
        if let Some(site) = self.book.revoked.get(&key) {
            return Err(Refusal::Revoked(site.clone()));
        }
        if let Some(site) = self.book.replaced.get(&key) {
            return Err(Refusal::Replaced(site.clone()));
        }
        if let Some(site) = self.book.site_of(key) {
            return Ok((site.clone(), self.book.sites[site].role, None));
        }
        let ticket = ticket.ok_or(Refusal::UnknownKey)?;
        if self.book.tickets.contains(&ticket) {
            return Err(Refusal::TicketUsed);
        }
        let invitation = self.book.invited.get(&ticket).ok_or(Refusal::UnknownTicket)?;
        let (site, role) = (invitation.site.clone(), invitation.role);
        if invitation.expires.is_some_and(|expires| expires <= now) {
            return Err(Refusal::Expired(site));
        }
        // Whoever lost a key comes back with another one.
        if self.book.sites.contains_key(&site) && !self.book.is_revoked(&site) {
            return Err(Refusal::NameTaken(site));
        }
        let entry = Entry::Admitted { site: site.clone(), key, ticket, role };
        self.book.apply(&entry).map_err(|_| Refusal::TicketUsed)?;
        Ok((site, role, Some(entry)))
    }

    /// Does what an operator wants, or an administrator, unless it is done already.
    pub(super) fn act(&mut self, act: Act, by: Option<SiteId>, orders: &mut Vec<Order>) {
        match act {
            Act::Invite(ticket, invitation) => {
                if !self.book.invited.contains_key(&ticket) && !self.book.tickets.contains(&ticket) {
                    self.record(Entry::Invited { ticket, invitation, by }, orders);
                }
            }
            Act::Revoke(site, key) => {
                if self.book.is_invited(&site) {
                    self.record(Entry::Withdrawn { site: site.clone(), by: by.clone() }, orders);
                }
                key.into_iter().for_each(|key| self.revoke(&site, key, by.clone(), orders));
            }
            Act::Succeed(key) => {
                if self.book.successor != Some(key) {
                    self.record(Entry::Succession { key }, orders);
                }
            }
        }
    }

    /// Gives a site another key, as the owner of its present one wants, unless that may not be.
    pub(super) fn rekey(&mut self, site: &SiteId, from: Digest, to: Digest, orders: &mut Vec<Order>) {
        if self.book.can_replace(site, from, to) {
            self.record(Entry::Rekeyed { site: site.clone(), from, to }, orders);
        }
    }

    /// Takes a key off the list, or the one that its owner has put in its place since, unless it is off already or the name is
    /// another's by now.
    fn revoke(&mut self, site: &SiteId, key: Digest, by: Option<SiteId>, orders: &mut Vec<Order>) {
        let Some(present) = self.book.sites.get(site).map(|member| member.key) else { return };
        let key = if self.book.replaced.get(&key) == Some(site) { present } else { key };
        let is_theirs = present == key;
        if !is_theirs || self.book.is_revoked(site) {
            return;
        }
        self.record(Entry::Revoked { site: site.clone(), key, by }, orders);
        for index in 0..self.rounds.len() {
            self.turn_down(index, "the site's key was revoked", |owner, _| owner == site, orders);
        }
    }

    /// What is being merged is booked to its session first, so this is tried again with every event.
    pub(super) fn return_leases_of_the_revoked(&mut self, orders: &mut Vec<Order>) {
        if self.book.revoked.is_empty() {
            return;
        }
        let open = self.book.sites.iter().filter(|(_, member)| member.open);
        let revoked = open.filter(|(_, member)| self.book.revoked.contains_key(&member.key));
        let sites: Vec<SiteId> = revoked.map(|(site, _)| site.clone()).collect();
        sites.iter().for_each(|site| self.give_back(site, "the site's key was revoked", orders));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::journal::{Book, Invitation};
    use crate::round::{Event, Goal, Sync};
    use crate::site::Time;

    #[test]
    fn nobody_escapes_a_revocation_by_a_new_key() {
        let site: SiteId = "a".parse().unwrap();
        let [layout, ticket, old, new] = [b"l", b"t", b"o", b"n"].map(|name| Digest::of(name));
        let mut book = Book::default();
        let theta = vec![layout];
        book.apply(&Entry::Began { run: "r".into(), seed: 1, context: 4, layout, theta }).unwrap();
        let goal = Goal { tokens: Some(8), minutes: None };
        let mut machine = Coordinator::new(Sync { fragments: 1, ..Sync::default() }, goal, book, vec![4]);
        let invitation = Invitation { site: site.clone(), role: Role::Train, expires: None };
        machine.handle(Time(1), Event::Acted(Act::Invite(ticket, invitation), None));
        machine.admit(old, Some(ticket), 1).unwrap();
        machine.handle(Time(2), Event::Rekeyed(site.clone(), old, new));
        assert_eq!(machine.book().site_of(new), Some(&site));
        // The operator has read the journal before.
        machine.handle(Time(3), Event::Acted(Act::Revoke(site.clone(), Some(old)), None));
        assert!(machine.book().is_revoked(&site));
        machine.handle(Time(4), Event::Rekeyed(site.clone(), new, Digest::of(b"x")));
        assert_eq!(machine.admit(new, None, 1), Err(Refusal::Revoked(site.clone())));
        assert_eq!(machine.admit(old, None, 1), Err(Refusal::Replaced(site)));
    }
}
