//! `atoll ticket`: what one site needs to join.

use std::fs;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use atoll_core::journal::{Invitation, Role};
use atoll_core::site::SiteId;
use atoll_node::identity::{Identity, Ticket};
use atoll_node::report::Report;
use atoll_node::run::{RunConfig, RunDir};

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// The run folder.
    dir: PathBuf,
    /// The site's name: a-z, 0-9 and -.
    site: SiteId,
    /// Where the site finds the coordinator, host:port; may be given several times.
    #[arg(long, value_name = "HOST:PORT")]
    address: Vec<String>,
    #[command(flatten)]
    terms: Terms,
}

/// What a ticket is good for.
#[derive(Debug, clap::Args)]
pub(crate) struct Terms {
    /// What its owner may do: train; observe, which is to look at the run and to fetch its model; or administer, which is to invite and
    /// to revoke besides.
    #[arg(long, default_value = "train")]
    role: Role,
    /// How long the ticket may wait for its site: so many s, m, h or d, or "never" expires. A site that it let in stays.
    #[arg(long, value_name = "TIME", default_value = "7d")]
    expires: Lifetime,
}

impl Terms {
    /// The invitation of a site under these terms.
    pub(crate) fn invite(&self, site: SiteId) -> Invitation {
        Invitation { site, role: self.role, expires: self.expires.end() }
    }
}

/// Seconds for which a ticket is good; none for ever.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Lifetime(Option<u64>);

impl FromStr for Lifetime {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "never" {
            return Ok(Self(None));
        }
        let seconds = [("s", 1), ("m", 60), ("h", 3600), ("d", 86400)].into_iter().find_map(|(unit, seconds)| {
            text.strip_suffix(unit)?.parse().ok().and_then(|count: u64| count.checked_mul(seconds))
        });
        match seconds {
            Some(seconds) if seconds > 0 => Ok(Self(Some(seconds))),
            _ => Err("a time is a whole number above 0 with s, m, h or d, such as 7d; or never".to_string()),
        }
    }
}

impl Lifetime {
    /// When it ends if it begins now, in seconds since 1970.
    fn end(self) -> Option<u64> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        self.0.map(|seconds| now.saturating_add(seconds))
    }
}

/// Sees that what is asked for in `dir` is not left for the day on which its coordinator leads.
pub(crate) fn must_not_stand_by(dir: &RunDir, hint: &str) -> Result<()> {
    if Report::load(&dir.status()).is_ok_and(|report| report.state == "standby") {
        bail!("the coordinator in {} stands by\nhint: {hint}", dir.0.display());
    }
    Ok(())
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let dir = RunDir(arguments.dir.clone());
    let config = RunConfig::load(&dir.config())?;
    let key = Identity::load(&dir.key())?;
    let addresses = addresses(arguments, &config, &dir)?;
    let invitation = arguments.terms.invite(arguments.site.clone());
    must_not_stand_by(&dir, "make tickets where the one is that leads, or with `atoll remote`")?;
    let ticket = Ticket::issue(&dir, &config.name, invitation, addresses, key.fingerprint)?;
    println!("{}", ticket.to_text());
    Ok(())
}

/// The ticket that this is, or that lies in the file of this name.
pub(crate) fn read(text: &str) -> Result<Ticket> {
    let path = PathBuf::from(text);
    let is_file = text.len() < 4096 && path.is_file();
    let text = if is_file {
        fs::read_to_string(&path).with_context(|| format!("{} cannot be read", path.display()))?
    } else {
        text.to_string()
    };
    Ticket::from_text(&text)
}

/// The folder of a site that was not given another.
pub(crate) fn folder(ticket: &Ticket) -> PathBuf {
    PathBuf::from(format!("atoll-{}", ticket.site))
}

fn addresses(arguments: &Arguments, config: &RunConfig, dir: &RunDir) -> Result<Vec<String>> {
    if !arguments.address.is_empty() {
        return Ok(arguments.address.clone());
    }
    if let Some(address) = &config.coordinator.advertise {
        return Ok(vec![address.clone()]);
    }
    let listen = Report::load(&dir.status()).ok().and_then(|report| report.listen);
    match listen {
        Some(address) if !address.starts_with("0.0.0.0") && !address.starts_with("[::]") => Ok(vec![address]),
        _ => bail!(
            "nobody knows where sites can reach the coordinator\nhint: give --address HOST:PORT, or set coordinator.advertise in {}",
            dir.config().display()
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read() {
        assert_eq!("90s".parse(), Ok(Lifetime(Some(90))));
        assert_eq!("7d".parse(), Ok(Lifetime(Some(604_800))));
        assert_eq!("never".parse(), Ok(Lifetime(None)));
        for bad in ["", "7", "0d", "-1d", "1.5h", "d", "99999999999999999999d", "9999999999999999999d"] {
            assert!(bad.parse::<Lifetime>().is_err(), "{bad}");
        }
    }
}
