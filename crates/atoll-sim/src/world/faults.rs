//! Crashes and cuts.

use super::World;
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
            (true, None) if self.coordinator.is_some() => self.crash_coordinator()?,
            (true, Some(index)) if self.sites[index].process.is_some() => self.crash_site(index)?,
            (false, Some(index)) => self.cut(index)?,
            _ => {}
        }
        let delay = self.chance.unit() * 4.0;
        self.after(delay, Happening::Fault);
        Ok(())
    }

    pub(super) fn crash_coordinator(&mut self) -> Result<(), String> {
        self.coordinator = None;
        self.life += 1;
        for index in 0..self.sites.len() {
            self.disconnect(index)?;
        }
        let delay = 0.5 + 5.0 * self.chance.unit();
        self.after(delay, Happening::CoordinatorStarts);
        Ok(())
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
