//! `atoll demo`: a coordinator and several sites as processes on this machine. It calls the same
//! subcommands that an operator of several machines would, and shows what they report.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use atoll_node::report::Report;
use atoll_node::run::RunDir;
use atoll_node::wan::Wan;

use crate::links::Links;
use crate::view::{self, View};
use crate::{precision, stop};

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Text to train on; without it, the sources of the crates Atoll is built from.
    #[arg(long, value_name = "PATH")]
    data: Option<PathBuf>,
    /// The run folder; the same folder goes on where it was stopped.
    #[arg(long, value_name = "DIR", default_value = "atoll-demo")]
    out: PathBuf,
    /// Minutes to train for.
    #[arg(long, default_value_t = 5.0)]
    minutes: f64,
    /// Sites; the last one is slowed to a quarter of its speed, if there are several.
    #[arg(long, default_value_t = 3)]
    sites: usize,
    /// Train on so many tokens instead of for some minutes.
    #[arg(long)]
    tokens: Option<u64>,
    /// Do not slow the last site.
    #[arg(long)]
    even: bool,
    /// Share of its threads' time that each site at full speed may use; without it, the sites divide
    /// the cores.
    #[arg(long)]
    share: Option<f64>,
    /// Put a thin, long, lossy link between each site and the coordinator: rate each way, ROUND TRIP (half
    /// of it each way), jitter, loss.
    ///
    /// Any part may be left out: 50mbit,50ms,5ms,0.1% or 10mbit,100ms or 1gbit. The parts are told apart by
    /// their units (kbit, mbit, gbit; us, ms, s; %); the second time is the jitter, by which a piece comes
    /// up to so much later. Each site has a link of its own that all its connections share. It is emulated
    /// in this program, without privileges: what is sent waits for its turn, then takes half a round trip,
    /// and a lost packet holds up its connection for another round trip.
    #[arg(long, value_name = "SPEC")]
    wan: Option<Wan>,
    #[command(flatten)]
    precision: precision::Arguments,
    /// The model's size.
    #[arg(long, default_value = "nano")]
    preset: String,
    /// What the trained model is asked to continue.
    #[arg(long)]
    prompt: Option<String>,
    /// Print the final report as JSON on standard output, and everything else on standard error.
    #[arg(long)]
    json: bool,
}

/// Speed of the slowed site.
const SLOW: f64 = 0.25;
/// Share of the cores that the sites divide when there are fewer cores than sites; the rest is for the
/// coordinator and everything else that runs here.
const SITES_SHARE: f64 = 0.92;
/// A child that ends this often within one minute is not started again.
const RESTARTS_PER_MINUTE: usize = 5;

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    if !(1..=64).contains(&arguments.sites) {
        bail!("--sites {} must be between 1 and 64", arguments.sites);
    }
    let stop = stop::flag(false)?;
    let demo = Demo { arguments, dir: RunDir(arguments.out.clone()), program: std::env::current_exe()? };
    if demo.dir.report().exists() && Report::load(&demo.dir.report()).is_ok_and(|report| report.state == "finished") {
        eprintln!("{} holds a finished run; this is what it learnt", demo.dir.0.display());
        return demo.tell(None);
    }
    demo.prepare()?;
    let mut links = arguments.wan.map(Links::new).transpose()?;
    if demo.train(&stop, links.as_mut())? {
        demo.tell(links.as_ref())
    } else {
        eprintln!("stopped; the same command goes on");
        Ok(())
    }
}

struct Demo<'a> {
    arguments: &'a Arguments,
    dir: RunDir,
    program: PathBuf,
}

/// A child process that is started again when it dies.
struct Ward {
    name: String,
    command: Command,
    child: Child,
    log: PathBuf,
    starts: Vec<Instant>,
}

impl Demo<'_> {
    /// `atoll new` and `atoll ingest`, unless an earlier demo did it.
    fn prepare(&self) -> Result<()> {
        let arguments = self.arguments;
        if !self.dir.config().exists() {
            let mut new = self.atoll("new");
            new.arg(&self.dir.0).args(["--preset", &arguments.preset]);
            match arguments.tokens {
                Some(tokens) => new.args(["--tokens", &tokens.to_string()]),
                None => new.args(["--minutes", &arguments.minutes.to_string()]),
            };
            if let Some(data) = &arguments.data {
                new.arg("--data").arg(data);
            }
            self.finish(new)?;
        }
        let mut ingest = self.atoll("ingest");
        ingest.args(&arguments.data).arg("--run").arg(&self.dir.0).arg("--out").arg(self.tokens());
        self.finish(ingest)
    }

    fn tokens(&self) -> PathBuf {
        self.dir.0.join("tokens")
    }

    /// Runs all processes until the run is finished (true) or stopped (false).
    fn train(&self, stop: &AtomicBool, links: Option<&mut Links>) -> Result<bool> {
        let logs = self.dir.0.join("logs");
        fs::create_dir_all(&logs)?;
        let (coordinator, address) = self.start_coordinator(&logs)?;
        let mut wards = vec![coordinator];
        wards.extend(self.start_sites(&address, links, &logs)?);
        let mut view = if self.arguments.json { None } else { View::open(self.arguments.sites) };
        let mut told = Instant::now();
        let result = loop {
            std::thread::sleep(Duration::from_millis(250));
            if stop.load(Ordering::SeqCst) {
                break Ok(false);
            }
            if let Ok(report) = Report::load(&self.dir.status()) {
                match &mut view {
                    Some(view) => view.draw(&report)?,
                    None if told.elapsed() > Duration::from_secs(10) => {
                        told = Instant::now();
                        eprintln!("{}", view::line(&report));
                    }
                    None => {}
                }
            }
            match self.look_after(&mut wards, &mut view) {
                Ok(true) => break Ok(true),
                Ok(false) => {}
                Err(error) => break Err(error),
            }
        };
        if let Some(view) = view {
            view.close();
        }
        wards.into_iter().for_each(Ward::end);
        result
    }

    /// The coordinator and where it listens, now and after each restart.
    fn start_coordinator(&self, logs: &Path) -> Result<(Ward, String)> {
        let port = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr())?.port();
        let address = format!("127.0.0.1:{port}");
        let mut command = self.atoll("coordinate");
        command.arg(&self.dir.0).args(["--listen", &address, "--supervised"]);
        let mut ward = Ward::start("coordinator", command, logs)?;
        loop {
            let listening =
                Report::load(&self.dir.status()).is_ok_and(|report| report.listen.as_deref() == Some(&address));
            if listening {
                return Ok((ward, address));
            }
            if let Some(status) = ward.child.try_wait()? {
                bail!("the coordinator ended ({status}): {}", ward.last_words());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn start_sites(&self, coordinator: &str, mut links: Option<&mut Links>, logs: &Path) -> Result<Vec<Ward>> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let count = self.arguments.sites;
        let slow = |index: usize| count > 1 && index + 1 == count && !self.arguments.even;
        let wanted: f64 = (0..count).map(|index| if slow(index) { SLOW } else { 1.0 }).sum();
        let threads = (cores / count).max(1);
        // With fewer cores than sites, each gets a fair share of a core and no more, so that the sites
        // do not slow one another.
        let fair = if cores >= count { 1.0 } else { (SITES_SHARE * cores as f64 / wanted).min(1.0) };
        let share = self.arguments.share.unwrap_or(fair);
        (0..count)
            .map(|index| {
                let name = format!("site-{}", index + 1);
                let address = match &mut links {
                    Some(links) => links.lay(&name, coordinator)?.to_string(),
                    None => coordinator.to_string(),
                };
                let ticket = self.ticket(&name, &address)?;
                let share = if slow(index) { share * SLOW } else { share };
                let mut command = self.atoll("join");
                command.arg(ticket).arg("--data").arg(self.tokens()).args(["--device", "cpu", "--supervised"]);
                command.arg("--dir").arg(self.dir.0.join("sites").join(&name));
                command.args(["--threads", &threads.to_string(), "--share", &format!("{share:.4}")]);
                command.args(self.arguments.precision.words());
                Ward::start(&name, command, logs)
            })
            .collect()
    }

    /// A ticket in a file of its own, so that its secret is in no process list. It is issued anew whenever
    /// the demo starts, for the address is another each time.
    fn ticket(&self, site: &str, address: &str) -> Result<PathBuf> {
        let mut ticket = self.atoll("ticket");
        ticket.arg(&self.dir.0).arg(site).args(["--address", address]);
        let output = ticket.stderr(Stdio::inherit()).output()?;
        if !output.status.success() {
            bail!("`atoll ticket` failed for {site}");
        }
        let folder = self.dir.0.join("sites").join(site);
        fs::create_dir_all(&folder)?;
        let path = folder.join("ticket");
        fs::write(&path, output.stdout)?;
        Ok(path)
    }

    /// Starts again what has died; true when the coordinator has ended well.
    fn look_after(&self, wards: &mut [Ward], view: &mut Option<View>) -> Result<bool> {
        for (index, ward) in wards.iter_mut().enumerate() {
            let Some(status) = ward.child.try_wait()? else { continue };
            if status.success() {
                if index == 0 {
                    return Ok(true);
                }
                continue; // A site that ended well has heard that the run is finished.
            }
            let line = format!("{} died ({status}) and is started again", ward.name);
            match view {
                Some(view) => view.say(&line)?,
                None => eprintln!("{line}"),
            }
            ward.restart()?;
        }
        Ok(false)
    }

    /// What the run came to: evaluation, a text, the report, what went over the links.
    fn tell(&self, links: Option<&Links>) -> Result<()> {
        let mut report = Report::load(&self.dir.report())?;
        let output = self
            .atoll("eval")
            .arg(&self.dir.0)
            .arg("--data")
            .arg(self.tokens())
            .arg("--json")
            .stderr(Stdio::inherit())
            .output()?;
        if !output.status.success() {
            bail!("`atoll eval` failed");
        }
        let figures: serde_json::Value = serde_json::from_slice(&output.stdout)?;
        report.bits_per_byte.last = figures["bits_per_byte"].as_f64();
        atoll_node::run::write_atomically(&self.dir.report(), &serde_json::to_vec_pretty(&report)?)?;
        let prompt = self.arguments.prompt.clone().unwrap_or_else(|| match self.arguments.data {
            Some(_) => "The ".to_string(),
            None => "/// Returns the ".to_string(),
        });
        let mut generate = self.atoll("generate");
        generate.arg(&self.dir.0).args(["--prompt", &prompt, "--tokens", "120"]).args(self.arguments.precision.words());
        let text = generate.stderr(Stdio::inherit()).output()?;
        if !text.status.success() {
            bail!("`atoll generate` failed");
        }
        let mut err = std::io::stderr();
        writeln!(err, "\nThe model of {} says:\n\n{}", self.dir.0.display(), String::from_utf8_lossy(&text.stdout))?;
        writeln!(err, "{}", view::line(&report))?;
        writeln!(
            err,
            "held-out bits per byte over all held-out text: {:.4}",
            report.bits_per_byte.last.unwrap_or(f64::NAN)
        )?;
        for line in links.map(Links::lines).unwrap_or_default() {
            writeln!(err, "{line}")?;
        }
        writeln!(err, "report   {}", self.dir.report().display())?;
        writeln!(err, "journal  {}", self.dir.journal().display())?;
        writeln!(
            err,
            "model    {} (`atoll generate {} --prompt …`)",
            self.dir.model().display(),
            self.dir.0.display()
        )?;
        if self.arguments.json {
            println!("{}", serde_json::to_string_pretty(&report)?);
        }
        Ok(())
    }

    fn atoll(&self, subcommand: &str) -> Command {
        let mut command = Command::new(&self.program);
        command.arg(subcommand);
        command
    }

    /// Runs a command to its end and shows what it says on standard error.
    fn finish(&self, mut command: Command) -> Result<()> {
        let output = command.stderr(Stdio::inherit()).stdin(Stdio::null()).output()?;
        std::io::stderr().write_all(&output.stdout)?;
        if !output.status.success() {
            bail!("the demo cannot be prepared\nhint: the line above says why");
        }
        Ok(())
    }
}

impl Ward {
    fn start(name: &str, mut command: Command, logs: &Path) -> Result<Self> {
        let log = logs.join(format!("{name}.log"));
        let child = spawn(&mut command, &log)?;
        Ok(Self { name: name.to_string(), command, child, log, starts: vec![Instant::now()] })
    }

    fn restart(&mut self) -> Result<()> {
        self.starts.retain(|start| start.elapsed() < Duration::from_secs(60));
        if self.starts.len() >= RESTARTS_PER_MINUTE {
            return Err(anyhow!(
                "{} dies again and again: {}\nhint: its whole log is {}",
                self.name,
                self.last_words(),
                self.log.display()
            ));
        }
        self.starts.push(Instant::now());
        self.child = spawn(&mut self.command, &self.log)?;
        Ok(())
    }

    /// The last error in its log.
    fn last_words(&self) -> String {
        let mut text = String::new();
        let _ = fs::File::open(&self.log).and_then(|mut file| file.read_to_string(&mut text));
        let last = text.lines().rev().find(|line| line.starts_with("error:")).or(text.lines().last());
        last.unwrap_or("it said nothing").trim_start_matches("error: ").to_string()
    }

    /// Lets the process end by itself: its standard input ends, as when the demo itself is gone.
    fn end(mut self) {
        drop(self.child.stdin.take());
        let patience = Instant::now();
        while patience.elapsed() < Duration::from_secs(20) {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn spawn(command: &mut Command, log: &Path) -> Result<Child> {
    let file = fs::OpenOptions::new().create(true).append(true).open(log);
    let file = file.with_context(|| format!("{} cannot be written", log.display()))?;
    command.stdin(Stdio::piped()).stdout(file.try_clone()?).stderr(file);
    command.spawn().context("a process cannot be started")
}
