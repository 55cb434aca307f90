//! Who belongs to the run. A key comes on the list with a ticket, once, and off it when the operator revokes it, for good.
//! A revoked site's contributions are turned down, and its leases go back as soon as no outer step needs them.

use super::{Coordinator, Order};
use crate::hash::Digest;
use crate::journal::Entry;
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
    /// Which site has this key; with a claim (a ticket's name and hash) also lets a new one in.
    ///
    /// # Errors
    /// A sentence for the site's operator.
    pub fn admit(&mut self, key: Digest, claim: Option<(SiteId, Digest)>) -> Result<(SiteId, Option<Entry>), Refusal> {
        if let Some(site) = self.book.revoked.get(&key) {
            return Err(Refusal::Revoked(site.clone()));
        }
        if let Some(site) = self.book.site_of(key) {
            return Ok((site.clone(), None));
        }
        let (site, ticket) = claim.ok_or(Refusal::UnknownKey)?;
        if self.book.tickets.contains(&ticket) {
            return Err(Refusal::TicketUsed);
        }
        // Whoever lost a key comes back with another one.
        if self.book.sites.contains_key(&site) && !self.book.is_revoked(&site) {
            return Err(Refusal::NameTaken(site));
        }
        let entry = Entry::Admitted { site: site.clone(), key, ticket };
        self.book.apply(&entry).map_err(|_| Refusal::TicketUsed)?;
        Ok((site, Some(entry)))
    }

    /// Takes a key off the list, unless it is off already or the site has another one by now.
    pub(super) fn revoke(&mut self, site: &SiteId, key: Digest, orders: &mut Vec<Order>) {
        let is_theirs = self.book.sites.get(site).is_some_and(|member| member.key == key);
        if !is_theirs || self.book.is_revoked(site) {
            return;
        }
        self.record(Entry::Revoked { site: site.clone(), key }, orders);
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
