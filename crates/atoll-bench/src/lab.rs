//! The network lab: `wanlab`, which runs one command per site in a network namespace of its own, joined by
//! emulated links, and counts what went over them. It lies beside this repository; where it is not, or we
//! are not root, the benchmarks that need it say so loudly and are skipped.
//!
//! The links here are a star: every site has a link of its own to the [`HUB`], and to a second place of a coordinator if
//! there is one. They start without a rate and without losses, and get theirs by [`Lab::shape`].

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, UNIX_EPOCH};

use anyhow::{Context, Result, anyhow, bail};
use serde::Serialize;
use serde_json::Value;

/// Name of the place at which the coordinator runs.
pub(crate) const HUB: &str = "hub";
/// Name of the place at which another coordinator stands by.
pub(crate) const SECOND_HUB: &str = "hub2";
/// Where the lab's source is, from the root of the repository.
const SOURCE: &str = "../shared/wanlab";
/// The lab is over after so long, whatever happens to us.
const LIMIT_MINUTES: u64 = 30;
/// How long a process may take to end when it is asked to.
const GRACE_SECONDS: u64 = 1;

/// One link from a site to the coordinator, both ways alike.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Link {
    /// Megabits per second.
    pub(crate) mbit: u32,
    /// Percent of the packets that are lost.
    pub(crate) loss: f64,
    /// Milliseconds there and back.
    pub(crate) rtt_ms: u32,
}

/// Builds the lab, or says loudly why there is none.
pub(crate) fn ready(bench: &str) -> Option<PathBuf> {
    match build() {
        Ok(program) => Some(program),
        Err(why) => {
            println!("NOTE: {bench} is SKIPPED and has no figures: {why:#}");
            None
        }
    }
}

fn build() -> Result<PathBuf> {
    let source = Path::new(SOURCE).join("Cargo.toml");
    if !source.exists() {
        bail!("the network lab, {SOURCE}, is absent");
    }
    if fs::metadata("/proc/self")?.uid() != 0 {
        bail!("network namespaces are for root");
    }
    let program = std::env::current_exe()?;
    let target = program.parent().and_then(Path::parent).context("a program is in a folder")?.join("wanlab");
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_string());
    let mut command = Command::new(cargo);
    command.args(["build", "--release", "--quiet", "--manifest-path"]).arg(&source).arg("--target-dir").arg(&target);
    if !command.status().context("cargo cannot be run")?.success() {
        bail!("the network lab cannot be built");
    }
    Ok(target.join("release/wanlab"))
}

/// What wanlab reads.
#[derive(Serialize)]
struct Plan {
    until: &'static str,
    limit: String,
    grace: String,
    sample: &'static str,
    sysctl: BTreeMap<&'static str, &'static str>,
    default: BTreeMap<&'static str, String>,
    site: BTreeMap<String, Place>,
    link: Vec<Length>,
}

/// A link that is not as long as the others.
#[derive(Serialize)]
struct Length {
    on: String,
    delay: String,
}

#[derive(Serialize)]
struct Place {
    run: &'static str,
    env: BTreeMap<&'static str, String>,
}

/// What a lab is made of.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Layout<'a> {
    /// Which benchmark its processes belong to.
    pub(crate) bench: &'a str,
    /// What this program does at each place.
    pub(crate) tasks: &'a [(String, String)],
    /// Milliseconds there and back, of all links but those from these places.
    pub(crate) rtt_ms: u32,
    pub(crate) rtts_ms: &'a [(String, u32)],
    pub(crate) congestion: Option<&'static str>,
    /// Whether the lab goes on when a process ends; else it ends with the first.
    pub(crate) endures: bool,
    /// What is to happen in it takes so long.
    pub(crate) seconds: f64,
}

/// A running lab. Dropping it ends everything in it.
pub(crate) struct Lab {
    child: Child,
    out: PathBuf,
    /// Bytes of its log that were looked at for processes that ended.
    read: usize,
}

impl Lab {
    /// Starts this program at each place, all joined by links that are neither narrow nor lossy.
    pub(crate) fn start(wanlab: &Path, out: &Path, layout: &Layout<'_>) -> Result<Self> {
        fs::create_dir_all(out)?;
        let path = out.join("lab.toml");
        fs::write(&path, toml::to_string(&layout.plan()?)?)?;
        let log = fs::File::create(out.join(LOG))?;
        let mut command = Command::new(wanlab);
        command.arg("run").arg(&path).arg("-o").arg(out);
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let child = command.spawn().with_context(|| format!("{} cannot be run", wanlab.display()))?;
        Ok(Self { child, out: out.to_path_buf(), read: 0 })
    }

    /// Gives every link its rate and its losses, from now on.
    pub(crate) fn shape(&self, link: Link) -> Result<()> {
        self.tell(&format!("set * * rate={}mbit loss={}", link.mbit, link.loss))
    }

    /// Gives all links of a place a rate, from now on.
    pub(crate) fn set_rate(&self, place: &str, mbit: u32) -> Result<()> {
        self.tell(&format!("set {place} * rate={mbit}mbit"))
    }

    /// Ends all processes at a place at once, as a loss of power does.
    pub(crate) fn kill(&self, place: &str) -> Result<()> {
        self.tell(&format!("kill {place}"))
    }

    /// Starts at a place what was started there first.
    pub(crate) fn start_again(&self, place: &str) -> Result<()> {
        self.tell(&format!("start {place}"))
    }

    /// Stops all processes at a place, until they are resumed.
    pub(crate) fn pause(&self, place: &str) -> Result<()> {
        self.tell(&format!("pause {place}"))
    }

    /// Lets them go on.
    pub(crate) fn resume(&self, place: &str) -> Result<()> {
        self.tell(&format!("resume {place}"))
    }

    /// Cuts all links of a place, both ways; what is under way is lost.
    pub(crate) fn cut(&self, place: &str) -> Result<()> {
        self.tell(&format!("cut {place} *"))
    }

    /// Joins them again.
    pub(crate) fn heal(&self, place: &str) -> Result<()> {
        self.tell(&format!("heal {place} *"))
    }

    /// Places whose processes have ended since this was asked last, and their exit codes.
    pub(crate) fn ended(&mut self) -> Vec<(String, i32)> {
        let text = fs::read_to_string(self.out.join(LOG)).unwrap_or_default();
        let news = text.get(self.read..).unwrap_or_default();
        let whole = news.rfind('\n').map_or(0, |end| end + 1);
        self.read += whole;
        news[..whole].lines().filter_map(exit).collect()
    }

    fn tell(&self, command: &str) -> Result<()> {
        let mut control = fs::OpenOptions::new().write(true).open(self.out.join("ctl"))?;
        writeln!(control, "{command}").context("the lab does not listen")
    }

    /// Waits until `done` holds.
    pub(crate) fn wait(&mut self, seconds: f64, what: &str, mut done: impl FnMut() -> bool) -> Result<()> {
        let began = Instant::now();
        while !done() {
            self.check()?;
            if began.elapsed().as_secs_f64() > seconds {
                bail!("{what}: not within {seconds:.0} seconds\n{}", self.last_words());
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(())
    }

    /// Whether all is well: nobody has interrupted us and the lab has not ended by itself.
    pub(crate) fn check(&mut self) -> Result<()> {
        if INTERRUPTED.load(Ordering::SeqCst) {
            bail!("interrupted");
        }
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => Err(anyhow!("the lab ended too early, {status}\n{}", self.last_words())),
        }
    }

    /// Ends all processes, and tells what went over the wires.
    pub(crate) fn end(mut self) -> Result<Wires> {
        self.tell("stop")?;
        let began = Instant::now();
        while self.child.try_wait()?.is_none() {
            if began.elapsed().as_secs() > 10 + GRACE_SECONDS {
                bail!("the lab does not end\n{}", self.last_words());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Wires::read(&self.out)
    }

    /// The ends of all logs.
    fn last_words(&self) -> String {
        let entries = fs::read_dir(&self.out).into_iter().flatten().flatten().map(|entry| entry.path());
        let mut logs: Vec<PathBuf> =
            entries.filter(|path| path.extension().is_some_and(|extension| extension == "log")).collect();
        logs.sort();
        let tail = |path: &PathBuf| {
            let text = fs::read_to_string(path).unwrap_or_default();
            let lines: Vec<&str> = text.lines().collect();
            let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            lines[lines.len().saturating_sub(4)..].iter().map(|line| format!("  {name}: {line}\n")).collect::<String>()
        };
        logs.iter().map(tail).collect()
    }
}

/// The lab's own log.
const LOG: &str = "wanlab.log";

/// `   12.345  oslo exited with 1`.
fn exit(line: &str) -> Option<(String, i32)> {
    let (head, code) = line.split_once(" exited with ")?;
    Some((head.split_whitespace().last()?.to_string(), code.trim().parse().ok()?))
}

impl Layout<'_> {
    fn plan(&self) -> Result<Plan> {
        let program = std::env::current_exe()?.display().to_string();
        let place = |task: &str| Place {
            run: r#"exec "$PROGRAM" "$BENCH" --worker "$TASK""#,
            env: BTreeMap::from([
                ("PROGRAM", program.clone()),
                ("BENCH", self.bench.to_string()),
                ("TASK", task.to_string()),
                // The end of a log tells why a process ended.
                ("RUST_BACKTRACE", "0".to_string()),
            ]),
        };
        let delay = |rtt_ms: u32| format!("{}us", u64::from(rtt_ms) * 500);
        let length = |(place, rtt_ms): &(String, u32)| Length { on: format!("{place} *"), delay: delay(*rtt_ms) };
        Ok(Plan {
            until: if self.endures { "all" } else { "any" },
            limit: format!("{}m", LIMIT_MINUTES + (self.seconds / 60.0) as u64),
            grace: format!("{GRACE_SECONDS}s"),
            sample: "50ms",
            sysctl: self.congestion.map(|name| ("net.ipv4.tcp_congestion_control", name)).into_iter().collect(),
            default: BTreeMap::from([("delay", delay(self.rtt_ms))]),
            site: self.tasks.iter().map(|(name, task)| (name.clone(), place(task))).collect(),
            link: self.rtts_ms.iter().map(length).collect(),
        })
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        // Nothing in a lab outlives it, however it ends.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// From now on Ctrl-C ends the benchmark in an orderly way, with nothing left behind.
pub(crate) fn heed_interrupts() -> Result<()> {
    ctrlc::set_handler(|| {
        if INTERRUPTED.swap(true, Ordering::SeqCst) {
            std::process::exit(130); // Asked twice: go at once.
        }
    })
    .context("signals cannot be handled")
}

/// One direction of one link, counted up to some moment. Bytes are those of whole IP packets, each segment
/// with its own headers, as the sender put them on the wire: lost ones are among them.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Count {
    at: f64,
    bytes: f64,
    delivered: f64,
}

/// What went over the wires.
#[derive(Debug, Default)]
pub(crate) struct Wires {
    links: BTreeMap<String, Vec<Count>>,
    /// Cores that the lab itself kept busy.
    pub(crate) router_cores: f64,
    /// Why the lab's own clockwork is not to be trusted this time, if so.
    pub(crate) doubts: Vec<String>,
}

/// Packets that the router handed on later than this spoil a measurement of delays.
const LATE_MS_MAX: f64 = 5.0;

impl Wires {
    fn read(out: &Path) -> Result<Self> {
        let path = out.join("links.csv");
        let text = fs::read_to_string(&path)?;
        let written = fs::metadata(&path)?.modified()?.duration_since(UNIX_EPOCH)?.as_secs_f64();
        let result: Value = serde_json::from_slice(&fs::read(out.join("result.json"))?)?;
        let seconds = |value: &Value| value.as_f64().unwrap_or(0.0);
        let router_cores = seconds(&result["router"]["cpu_seconds"]) / seconds(&result["seconds"]).max(1e-3);
        Ok(Self { links: counts(&text, written), router_cores, doubts: doubts(&result) })
    }

    /// Bytes that `from` put on the wire to `to` between two moments.
    pub(crate) fn bytes(&self, from: &str, to: &str, window: (f64, f64)) -> f64 {
        self.between(from, to, window, |count| count.bytes)
    }

    /// Bytes that `to` got from `from` between two moments.
    pub(crate) fn delivered(&self, from: &str, to: &str, window: (f64, f64)) -> f64 {
        self.between(from, to, window, |count| count.delivered)
    }

    /// The moment by which `to` had got so many bytes from `from`.
    pub(crate) fn delivered_by(&self, from: &str, to: &str, bytes: f64) -> Option<f64> {
        let counts = self.counts(from, to);
        let after = counts.iter().position(|count| count.delivered >= bytes)?;
        let (a, b) = (counts[after.saturating_sub(1)], counts[after]);
        let share = (bytes - a.delivered) / (b.delivered - a.delivered).max(1.0);
        Some(a.at + (b.at - a.at) * share.clamp(0.0, 1.0))
    }

    fn between(&self, from: &str, to: &str, window: (f64, f64), of: impl Fn(&Count) -> f64) -> f64 {
        let counts: Vec<(f64, f64)> = self.counts(from, to).iter().map(|count| (count.at, of(count))).collect();
        between(&counts, window)
    }

    fn counts(&self, from: &str, to: &str) -> &[Count] {
        self.links.get(&format!("{from}>{to}")).map_or(&[], Vec::as_slice)
    }
}

/// How much a counter that was read now and then grew in that stretch.
pub(crate) fn between(counts: &[(f64, f64)], window: (f64, f64)) -> f64 {
    let at = |moment: f64| -> f64 {
        let after = counts.partition_point(|(at, _)| *at < moment);
        let (Some(b), Some(a)) = (counts.get(after).or(counts.last()), counts.get(after.saturating_sub(1))) else {
            return 0.0;
        };
        let share = if b.0 > a.0 { ((moment - a.0) / (b.0 - a.0)).clamp(0.0, 1.0) } else { 1.0 };
        a.1 + (b.1 - a.1) * share
    };
    at(window.1) - at(window.0)
}

/// The lines of `links.csv`; its last one was written at that moment.
fn counts(text: &str, written: f64) -> BTreeMap<String, Vec<Count>> {
    let mut links: BTreeMap<String, Vec<Count>> = BTreeMap::new();
    let mut last = 0.0;
    for line in text.lines().skip(1) {
        let fields: Vec<&str> = line.split(',').collect();
        let number = |index: usize| fields.get(index).and_then(|field| field.parse::<f64>().ok());
        let (Some(at), Some(bytes), Some(delivered)) = (number(0), number(3), number(7)) else { continue };
        last = f64::max(last, at);
        links.entry(fields[1].to_string()).or_default().push(Count { at, bytes, delivered });
    }
    links.values_mut().flatten().for_each(|count| count.at += written - last);
    links
}

fn doubts(result: &Value) -> Vec<String> {
    let router = &result["router"];
    let drops: u64 = router["kernel_drops"].as_object().into_iter().flatten().filter_map(|(_, n)| n.as_u64()).sum();
    let late_ms = router["late_us"]["p99"].as_f64().unwrap_or(f64::NAN) / 1e3;
    let mut doubts = Vec::new();
    if drops > 0 {
        doubts.push(format!("the lab's kernel dropped {drops} packets by itself"));
    }
    if late_ms.is_nan() || late_ms > LATE_MS_MAX {
        doubts.push(format!("one packet in a hundred was {late_ms:.1} ms late or more: the machine was too busy"));
    }
    doubts
}

#[cfg(test)]
mod tests {
    use super::*;

    const CSV: &str = "seconds,link,packets,bytes,lost,queue_full,cut,delivered_bytes\n\
        0.000,hub>oslo,0,0,0,0,0,0\n0.000,oslo>hub,0,0,0,0,0,0\n\
        1.000,hub>oslo,1,1000,0,0,0,800\n1.000,oslo>hub,1,52,0,0,0,52\n\
        2.000,hub>oslo,3,3000,0,0,0,2800\n2.000,oslo>hub,3,156,0,0,0,156\n";

    #[test]
    fn counters_are_read_at_any_moment() {
        let wires = Wires { links: counts(CSV, 102.0), ..Wires::default() };
        assert_eq!(wires.bytes("hub", "oslo", (100.5, 101.5)), 1500.0);
        assert_eq!(wires.bytes("oslo", "hub", (90.0, 200.0)), 156.0);
        assert_eq!(wires.delivered("hub", "oslo", (101.0, 102.0)), 2000.0);
        assert_eq!(wires.delivered_by("hub", "oslo", 1800.0), Some(101.5));
        assert_eq!(wires.delivered_by("hub", "oslo", 3000.0), None);
        assert_eq!(wires.bytes("hub", "nowhere", (100.0, 101.0)), 0.0);
    }

    #[test]
    fn processes_that_ended_are_seen_in_the_log() {
        assert_eq!(exit("   12.345  site-1 exited with 137"), Some(("site-1".to_string(), 137)));
        assert_eq!(exit("   12.345  kill site-1"), None);
    }

    #[test]
    fn a_starved_router_is_doubted() {
        let good = serde_json::json!({"router": {"kernel_drops": {"hub": 0}, "late_us": {"p99": 80.0}}});
        assert_eq!(doubts(&good), Vec::<String>::new());
        let bad = serde_json::json!({"router": {"kernel_drops": {"hub": 2}, "late_us": {"p99": 9000.0}}});
        assert_eq!(doubts(&bad).len(), 2);
    }
}
