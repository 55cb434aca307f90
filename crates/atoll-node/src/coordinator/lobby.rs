//! Connections of which nobody knows yet whose they are. Anybody can open them, so they have little room, and whoever comes
//! next gets it: the one that has waited longest gives way, first among those from the same address. Who means well
//! has shown its key long before its turn comes, and else tries again.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex};

use tokio::sync::Notify;

use super::shelf::lock;

/// Connections that may wait.
const STRANGERS_MAX: usize = 256;
/// Connections that may wait from one address.
const STRANGERS_PER_ADDRESS_MAX: usize = 64;

/// The room for strangers.
#[derive(Default)]
pub(super) struct Lobby(Mutex<Queue<Arc<Notify>>>);

/// A place in it, until it is dropped.
pub(super) struct Place {
    lobby: Arc<Lobby>,
    number: u64,
    turned_out: Arc<Notify>,
}

impl Lobby {
    /// Gives a place to a connection from there.
    pub(super) fn enter(self: &Arc<Self>, from: IpAddr) -> Place {
        let turned_out = Arc::new(Notify::new());
        let (number, gone) = lock(&self.0).enter(network(from), turned_out.clone());
        gone.iter().for_each(|gone| gone.notify_one());
        Place { lobby: self.clone(), number, turned_out }
    }
}

impl Place {
    /// Waits until the place is another's.
    pub(super) async fn lost(&self) {
        self.turned_out.notified().await;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        lock(&self.lobby.0).leave(self.number);
    }
}

/// What counts as one address: of IPv6 everybody has 2^64.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => IpAddr::V6((address.to_bits() & !u128::from(u64::MAX)).into()),
        address => address,
    }
}

/// Who waits, in the order of coming.
struct Queue<T> {
    next: u64,
    waiting: BTreeMap<u64, (IpAddr, T)>,
}

impl<T> Default for Queue<T> {
    fn default() -> Self {
        Self { next: 0, waiting: BTreeMap::new() }
    }
}

impl<T> Queue<T> {
    /// Lets one in; returns its number, and whoever has to go.
    fn enter(&mut self, from: IpAddr, guest: T) -> (u64, Option<T>) {
        let mut neighbours =
            self.waiting.iter().filter(|(_, (address, _))| *address == from).map(|(number, _)| *number);
        let oldest_neighbour = neighbours.next();
        let goes = match oldest_neighbour {
            Some(number) if neighbours.count() + 1 >= STRANGERS_PER_ADDRESS_MAX => Some(number),
            _ if self.waiting.len() >= STRANGERS_MAX => self.waiting.keys().next().copied(),
            _ => None,
        };
        let gone = goes.and_then(|number| self.waiting.remove(&number)).map(|(_, guest)| guest);
        self.next += 1;
        self.waiting.insert(self.next, (from, guest));
        (self.next, gone)
    }

    fn leave(&mut self, number: u64) {
        self.waiting.remove(&number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(number: u8) -> IpAddr {
        IpAddr::from([10, 0, 0, number])
    }

    #[test]
    fn a_crowd_from_one_address_displaces_itself_only() {
        let mut queue = Queue::default();
        assert_eq!(queue.enter(address(1), 0), (1, None));
        let gone: Vec<u32> = (1..=1000).filter_map(|guest| queue.enter(address(2), guest).1).collect();
        assert_eq!(gone, (1..=1000 - STRANGERS_PER_ADDRESS_MAX as u32).collect::<Vec<_>>());
        assert!(queue.waiting.contains_key(&1));
    }

    #[test]
    fn the_room_is_full_at_last() {
        let mut queue = Queue::default();
        let gone: Vec<u32> = (0..1000).filter_map(|guest| queue.enter(address((guest % 100) as u8), guest).1).collect();
        assert_eq!(gone, (0..1000 - STRANGERS_MAX as u32).collect::<Vec<_>>());
        queue.leave(1000);
        assert_eq!(queue.enter(address(200), 1), (1001, None), "who was let in makes room");
    }

    #[test]
    fn networks() {
        let same = |a: &str, b: &str| network(a.parse().unwrap()) == network(b.parse().unwrap());
        assert!(same("2001:db8::1", "2001:db8::ffff:1") && !same("2001:db8::1", "2001:db8:0:1::1"));
        assert!(same("::ffff:10.0.0.1", "10.0.0.1") && !same("10.0.0.1", "10.0.0.2"));
    }
}
