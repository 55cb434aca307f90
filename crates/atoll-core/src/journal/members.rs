//! Who belongs to a run, and what each may do. The operator invites with a ticket, of which the journal has the hash; the
//! first key that shows it is on the list from then on. A key comes off the list when its owner replaces it or when the
//! operator revokes it, for good. Nothing else decides about it, so whoever has the journal can lead the run.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{Book, BookError, Member, out_of_order};
use crate::hash::Digest;
use crate::site::SiteId;

/// What the owner of a key may do.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Train: lease samples and contribute; look at the run, and fetch the model.
    #[default]
    Train,
    /// Look at the run, and fetch the model.
    Observe,
    /// What an observer may; invite and revoke.
    Administer,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Train => "train",
            Self::Observe => "observe",
            Self::Administer => "administer",
        })
    }
}

impl FromStr for Role {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let all = [Self::Train, Self::Observe, Self::Administer];
        let named = all.into_iter().find(|role| role.to_string() == text);
        named.ok_or_else(|| format!("{text} is no role: train, observe or administer"))
    }
}

/// What a ticket is good for, until it is used or withdrawn.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Invitation {
    /// The name that it gives.
    pub site: SiteId,
    /// What its owner may do.
    #[serde(default)]
    pub role: Role,
    /// Until when, in seconds since 1970; none for ever.
    #[serde(default)]
    pub expires: Option<u64>,
}

/// What an operator does about members and keys.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Act {
    /// Invites the owner of the ticket whose secret has this hash.
    Invite(Digest, Invitation),
    /// Withdraws all unused tickets of that name, and takes its key off the list if it is this one.
    Revoke(SiteId, Option<Digest>),
    /// Has the coordinators' next key told to all who know them by the present one.
    Succeed(Digest),
}

impl Book {
    /// The site whose key has this fingerprint.
    pub fn site_of(&self, key: Digest) -> Option<&SiteId> {
        self.sites.iter().find(|(_, member)| member.key == key).map(|(site, _)| site)
    }

    /// Whether the key that `site` has was revoked.
    pub fn is_revoked(&self, site: &SiteId) -> bool {
        self.sites.get(site).is_some_and(|member| self.revoked.contains_key(&member.key))
    }

    /// Whether there are unused tickets of that name.
    pub fn is_invited(&self, site: &SiteId) -> bool {
        self.invited.values().any(|invitation| invitation.site == *site)
    }

    /// Whether this key was on the list and must not come back.
    pub fn is_off_the_list(&self, key: Digest) -> bool {
        self.revoked.contains_key(&key) || self.replaced.contains_key(&key)
    }

    /// Whether the owner of the key `from` may have `to` in its place.
    pub fn can_replace(&self, site: &SiteId, from: Digest, to: Digest) -> bool {
        let has_it = self.sites.get(site).is_some_and(|member| member.key == from) && !self.is_off_the_list(from);
        has_it && !self.is_off_the_list(to) && self.site_of(to).is_none()
    }

    pub(super) fn invite(&mut self, ticket: Digest, invitation: &Invitation) -> Result<(), BookError> {
        if self.tickets.contains(&ticket) || self.invited.insert(ticket, invitation.clone()).is_some() {
            return out_of_order(format!("the ticket of {} was given out before", invitation.site));
        }
        Ok(())
    }

    pub(super) fn withdraw(&mut self, site: &SiteId) {
        self.invited.retain(|_, invitation| invitation.site != *site);
    }

    pub(super) fn admit(&mut self, site: &SiteId, key: Digest, ticket: Digest, role: Role) -> Result<(), BookError> {
        if self.is_off_the_list(key) {
            return out_of_order(format!("the key of {site} is off the list"));
        }
        if !self.tickets.insert(ticket) {
            return out_of_order(format!("the ticket of {site} was used before"));
        }
        self.invited.remove(&ticket);
        let member = self.sites.entry(site.clone()).or_insert_with(|| Member::new(key));
        (member.key, member.role) = (key, role);
        Ok(())
    }

    pub(super) fn replace(&mut self, site: &SiteId, from: Digest, to: Digest) -> Result<(), BookError> {
        if !self.can_replace(site, from, to) {
            return out_of_order(format!("{site} cannot have this key instead of that"));
        }
        self.replaced.insert(from, site.clone());
        self.member(site)?.key = to;
        Ok(())
    }

    pub(super) fn revoke(&mut self, site: &SiteId, key: Digest) -> Result<(), BookError> {
        if self.member(site)?.key != key {
            return out_of_order(format!("{site} has another key"));
        }
        match self.revoked.insert(key, site.clone()) {
            None => Ok(()),
            Some(_) => out_of_order(format!("the key of {site} was revoked before")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::journal::Entry;

    #[test]
    fn roles_have_names() {
        for role in [Role::Train, Role::Observe, Role::Administer] {
            assert_eq!(role.to_string().parse(), Ok(role));
            assert_eq!(serde_json::to_string(&role).unwrap(), format!("\"{role}\""));
        }
        assert!("root".parse::<Role>().is_err());
    }

    #[test]
    fn a_ticket_lets_one_key_in_and_a_key_is_replaced_once() {
        let site: SiteId = "a".parse().unwrap();
        let [ticket, other, old, new] = [b"t", b"u", b"o", b"n"].map(|name| Digest::of(name));
        let (role, by) = (Role::Observe, None);
        let invitation = Invitation { site: site.clone(), role, expires: Some(7) };
        let invited = |ticket| Entry::Invited { ticket, invitation: invitation.clone(), by: by.clone() };
        let admitted = |key, ticket| Entry::Admitted { site: site.clone(), key, ticket, role };
        let replaced = |from, to| Entry::Rekeyed { site: site.clone(), from, to };
        let mut book = Book::default();
        book.apply(&invited(ticket)).unwrap();
        assert!(book.clone().apply(&invited(ticket)).is_err());
        book.apply(&admitted(old, ticket)).unwrap();
        assert!(!book.is_invited(&site) && book.sites[&site].role == Role::Observe);
        assert!(book.clone().apply(&invited(ticket)).is_err(), "a used ticket does not come back");
        assert!(book.clone().apply(&replaced(new, old)).is_err());
        book.apply(&replaced(old, new)).unwrap();
        assert_eq!((book.site_of(new), book.site_of(old)), (Some(&site), None));
        for key in [old, new] {
            assert!(book.clone().apply(&replaced(new, key)).is_err(), "it was on the list before");
        }
        assert!(book.clone().apply(&admitted(old, other)).is_err());
        book.apply(&invited(other)).unwrap();
        book.apply(&Entry::Withdrawn { site: site.clone(), by: None }).unwrap();
        assert!(!book.is_invited(&site) && book.site_of(new).is_some());
        book.apply(&Entry::Revoked { site: site.clone(), key: new, by: None }).unwrap();
        assert!(book.clone().apply(&replaced(new, Digest::of(b"x"))).is_err(), "the revoked cannot help themselves");
    }
}
