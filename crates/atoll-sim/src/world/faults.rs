//! Crashes and cuts.

use super::World;
use super::failover::Duty;
use super::happening::Happening;

impl World<'_> {
    pub(super) fn fault(&mut self) -> Result<(), String> {
        let hardships = self.description.hardships;
        if self.faults_left == 0 || self.seconds() > hardships.seconds {
            self.faults_left = 0;
            return Ok(());
        }
        self.faults_left -= 1;
        let all = u64::from(hardships.crashes + hardships.cuts);
        let crash = self.chance.below(all) < u64::from(hardships.crashes);
        let victim = self.chance.below(self.sites.len() as u64 + 1) as usize;
        match (crash, victim.checked_sub(1)) {
            (true, None) => self.harm_a_coordinator()?,
            (true, Some(index)) if self.sites[index].process.is_some() => self.crash_site(index)?,
            (false, Some(index)) => self.cut(index)?,
            _ => {}
        }
        let delay = self.chance.unit() * 4.0;
        self.after(delay, Happening::Fault);
        Ok(())
    }

    /// Kills a coordinator, or lets it stand still if there is another.
    fn harm_a_coordinator(&mut self) -> Result<(), String> {
        if self.posts.len() == 1 {
            return if self.posts[0].head().is_some() { self.crash_coordinator(0) } else { Ok(()) };
        }
        let leader = self.leader().map_or(0, |(post, _)| post);
        let post = if self.chance.chance(0.75) { leader } else { 1 - leader };
        match (self.chance.chance(0.5), &self.posts[post].duty) {
            (_, Duty::None) => Ok(()),
            (true, _) => self.crash_coordinator(post),
            (false, _) => {
                self.pause_coordinator(post);
                Ok(())
            }
        }
    }

    fn crash_site(&mut self, index: usize) -> Result<(), String> {
        self.disconnect(index)?;
        if self.chance.chance(0.5) {
            self.stop_site(index);
        }
        self.sites[index].process = None;
        self.sites[index].life += 1;
        let delay = 0.2 + 1.25 * self.description.hardships.away * self.chance.unit();
        self.after(delay, Happening::SiteStarts(index));
        Ok(())
    }

    fn cut(&mut self, index: usize) -> Result<(), String> {
        self.disconnect(index)?;
        if self.sites[index].process.as_ref().is_some_and(|process| !process.stepping) {
            self.work(index)?;
        }
        let (delay, life) = (self.chance.unit() * self.description.hardships.away, self.sites[index].life);
        self.after(delay, Happening::Reconnect(index, life));
        Ok(())
    }
}
