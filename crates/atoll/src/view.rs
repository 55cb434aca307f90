//! The live view: a few lines below the program's other output that are painted anew with every
//! report. [`View`] owns those lines; [`paint`] turns a [`Report`] into cells and knows no terminal.
//!
//! The view asks the terminal for nothing but its size. It moves only relative to the cursor, which
//! rests on the line below the picture, and changes no mode. So there is nothing to restore, whether
//! the program closes the view, panics or is killed; it may run in the background; and Ctrl-C stays
//! a signal. (ratatui's own `Viewport::Inline` asks where the cursor is, in raw mode, at each resize.)

use std::io::{self, IsTerminal, Write};

use atoll_node::report::{FirstLast, FragmentReport, Report, SiteReport};
use ratatui::backend::IntoCrossterm;
use ratatui::buffer::{Buffer, Cell};
use ratatui::crossterm::style::{Print, PrintStyledContent, StyledContent};
use ratatui::crossterm::terminal::{self, Clear, ClearType};
use ratatui::crossterm::{cursor, queue};
use ratatui::layout::{Constraint, Rect};
use ratatui::style::{Color, Style, Stylize};
use ratatui::text::{Line, Span, Text};
use ratatui::widgets::{Row, Sparkline, Table, Widget};

/// Lines above the first site.
const HEAD_ROWS: u16 = 7;
const SITES_MAX: usize = 16;
const WIDTH_MAX: u16 = 120;
/// Width of the labels at the left.
const LABEL: u16 = 11;

/// A picture of the run at the end of the terminal's output.
pub(crate) struct View {
    sites: usize,
    shown: Buffer,
}

impl View {
    /// A view on stdout with room for so many sites, or None when stdout is no terminal.
    pub(crate) fn open(sites: usize) -> Option<View> {
        let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        (io::stdout().is_terminal() && !dumb).then(|| View { sites, shown: Buffer::empty(Rect::ZERO) })
    }

    /// Shows a newer report in place of the last.
    pub(crate) fn draw(&mut self, report: &Report) -> io::Result<()> {
        let (columns, rows) = screen();
        let sites = report.sites.len().max(self.sites).clamp(1, SITES_MAX) as u16;
        // The last column stays free, so that no line wraps; the last row is the cursor's.
        let area = Rect::new(0, 0, (columns - 1).min(WIDTH_MAX), (HEAD_ROWS + sites).min(rows - 1));
        let mut picture = Buffer::empty(area);
        paint(report, area, &mut picture);
        send(&replace(&self.shown, columns, "", &picture)?)?;
        self.shown = picture;
        Ok(())
    }

    /// Prints a line above the view. Control characters are left out.
    pub(crate) fn say(&mut self, line: &str) -> io::Result<()> {
        send(&replace(&self.shown, screen().0, &format!("{line}\n"), &self.shown)?)
    }

    /// Leaves the last picture on the screen.
    pub(crate) fn close(self) {}
}

/// Columns and rows of the terminal, at least 2 each. A pseudo-terminal without a size says 0.
fn screen() -> (u16, u16) {
    let (columns, rows) = terminal::size().unwrap_or_default();
    let known = |size: u16, usual: u16| if size == 0 { usual } else { size.max(2) };
    (known(columns, 80), known(rows, 24))
}

/// One write for the whole picture, so that it does not flicker.
fn send(bytes: &[u8]) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(bytes)?;
    out.flush()
}

/// What to send so that `said` and the `new` picture take the place of the `old` one.
fn replace(old: &Buffer, columns: u16, said: &str, new: &Buffer) -> io::Result<Vec<u8>> {
    let mut out = Vec::new();
    // Terminals that have become narrower wrap what they show.
    let up: u16 = lines(old).map(|line| (line.len() as u16).div_ceil(columns).max(1)).sum();
    if up > 0 {
        queue!(out, cursor::MoveUp(up), cursor::MoveToColumn(0))?;
    }
    for line in said.lines() {
        let line: String = line.chars().filter(|letter| !letter.is_control()).collect();
        queue!(out, Clear(ClearType::FromCursorDown), Print(line), Print("\r\n"))?;
    }
    for line in lines(new) {
        let mut free = 0;
        let cells: Vec<(usize, &Cell)> = line.iter().enumerate().collect();
        for run in cells.chunk_by(|(_, one), (_, next)| (one.fg, one.modifier) == (next.fg, next.modifier)) {
            let mut text = String::new();
            for (column, cell) in run {
                // A wide letter covers the cell after it.
                if *column >= free {
                    text.push_str(cell.symbol());
                    free = column + Span::raw(cell.symbol()).width();
                }
            }
            let mut style = Style::new().add_modifier(run[0].1.modifier);
            style.fg = Some(run[0].1.fg).filter(|colour| *colour != Color::Reset);
            queue!(out, PrintStyledContent(StyledContent::new(style.into_crossterm(), text)))?;
        }
        queue!(out, Clear(ClearType::UntilNewLine), Print("\r\n"))?;
    }
    queue!(out, Clear(ClearType::FromCursorDown))?;
    Ok(out)
}

/// The lines of a picture without the blanks at their ends.
fn lines(picture: &Buffer) -> impl Iterator<Item = &[Cell]> {
    let width = usize::from(picture.area.width).max(1);
    picture.content.chunks(width).map(|line| {
        let end = line.iter().rposition(|cell| cell.symbol() != " ").map_or(0, |last| last + 1);
        &line[..end]
    })
}

/// Paints a report: the run in the first lines, its sites below.
fn paint(report: &Report, area: Rect, buf: &mut Buffer) {
    let rows = |y: u16, height: u16| Rect::new(0, y, area.width, height).intersection(area);
    let state = Line::from(format!("● {}", report.state).fg(colour(&report.state))).right_aligned();
    let facts = [
        report.run.clone(),
        format!("{} parameters", count(report.parameters as f64)),
        format!("{} tokens", count(report.tokens as f64)),
        format!("model {}", report.digest.short()),
    ];
    let facts = fit(&facts, area.width.saturating_sub(state.width() as u16 + 2));
    let (name, facts) = facts.split_at(report.run.len());
    Line::from(vec![name.bold(), facts.dim()]).render(rows(0, 1), buf);
    state.render(rows(0, 1), buf);
    bar(report, area.width).render(rows(1, 1), buf);

    let waits = if report.state == "training" { tally(&report.rounds) } else { Vec::new() };
    let rounds = fit(&[vec![plural(report.commits, "commit")], waits].concat(), area.width.saturating_sub(LABEL));
    let (loss, bits) = (from_to(report.loss), from_to(report.bits_per_byte));
    let x = LABEL + loss.chars().count().max(bits.chars().count()) as u16 + 2;
    for (y, label, text) in [(2, "loss", loss), (3, "bits/byte", bits), (4, "rounds", rounds)] {
        Line::from(label.dim()).render(rows(y, 1), buf);
        Line::from(text).render(Rect::new(LABEL, y, area.width, 1).intersection(area), buf);
    }
    let chart = Rect::new(x, 2, area.width.saturating_sub(x), 2).intersection(area);
    Sparkline::default().data(heights(&report.history, chart.width)).max(16).cyan().render(chart, buf);
    table(&report.sites, rows(HEAD_ROWS - 1, area.height), buf);
}

/// The progress of the run and its time left.
fn bar(report: &Report, width: u16) -> Line<'static> {
    let time = match (report.state.as_str(), report.seconds_left) {
        ("training", Some(left)) => format!("{} left", duration(left)),
        ("finished", _) => format!("took {}", duration(report.seconds)),
        _ => format!("{} so far", duration(report.seconds)),
    };
    let label = format!("  {:3.0}%  {time}", report.progress * 100.0);
    let room = usize::from(width).saturating_sub(label.chars().count());
    let done = ((report.progress * room as f64) as usize).min(room);
    Line::from(vec!["━".repeat(done).green(), "─".repeat(room - done).dim(), label.into()])
}

/// Place, title (a blank before it: numbers, at the right), greatest width, text.
type Column = (u8, &'static str, usize, fn(&SiteReport) -> String);

/// What is told of a site. The last ones give way first where room is short.
const COLUMNS: [Column; 10] = [
    (0, "site", 20, |site| site.name.clone()),
    (2, "state", 12, |site| format!("● {}", site.state)),
    (3, " tok/s", 12, |site| if site.state == "away" { "–".to_string() } else { count(site.tokens_per_second) }),
    (9, " mismatches", 12, |site| site.digest_mismatches.to_string()),
    (4, " steps", 12, |site| site.steps.to_string()),
    (7, " ↑ up", 12, |site| bytes(site.bytes_sent)),
    (8, " ↓ down", 12, |site| bytes(site.bytes_received)),
    (1, DEVICE, 12, |site| format!("{} {}", site.engine, site.device)),
    (5, " tokens", 12, |site| count(site.tokens as f64)),
    (6, " busy", 12, |site| format!("{:.0}%", site.utilization * 100.0)),
];
/// This column grows into the room that is left.
const DEVICE: &str = "device";
const DEVICE_MAX: usize = 32;

/// A table of the sites, with as many columns and rows as fit.
fn table(sites: &[SiteReport], area: Rect, buf: &mut Buffer) {
    let natural = |column: &Column, most: usize| {
        let widths = sites.iter().map(|site| column.3(site).chars().count());
        widths.fold(column.1.trim().chars().count(), usize::max).min(most) as u16
    };
    let mut left = area.width + 2;
    let mut columns: Vec<(Column, u16)> = Vec::new();
    for column in COLUMNS {
        let width = natural(&column, column.2);
        let needless = column.1 == " mismatches" && sites.iter().all(|site| site.digest_mismatches == 0);
        if (width + 2 <= left || columns.is_empty()) && !needless {
            left = left.saturating_sub(width + 2);
            columns.push((column, width));
        }
    }
    for (column, width) in columns.iter_mut().filter(|(column, _)| column.1 == DEVICE) {
        *width = natural(column, DEVICE_MAX).min(*width + left);
    }
    columns.sort_by_key(|(column, _)| column.0);

    let cell = |(column, width): &(Column, u16), text: &str| {
        let text = Text::from(clip(text, *width));
        if column.1.starts_with(' ') { text.right_aligned() } else { text }
    };
    let room = usize::from(area.height.saturating_sub(1));
    let shown = if sites.len() > room { room.saturating_sub(1) } else { sites.len() };
    let rows = sites[..shown].iter().map(|site| {
        Row::new(columns.iter().map(|column| match (cell(column, &column.0.3(site)), column.0.1) {
            (text, "state") => text.fg(colour(&site.state)),
            (text, " mismatches") if site.digest_mismatches > 0 => text.red(),
            (text, _) if site.state == "away" => text.dim(),
            (text, _) => text,
        }))
    });
    let head = Row::new(columns.iter().map(|column| cell(column, column.0.1.trim()))).dim();
    let widths = columns.iter().map(|(_, width)| Constraint::Length(*width));
    Widget::render(Table::new(rows, widths).header(head).column_spacing(2), area, buf);
    let rest = match sites.len() - shown {
        0 if sites.is_empty() => "no site has joined yet".to_string(),
        0 => return,
        more => format!("… and {more} more"),
    };
    let below = Rect { y: area.y + 1 + shown as u16, height: 1, ..area };
    Line::from(rest.dim()).render(below.intersection(area), buf);
}

/// One line of the same facts, for logs and pipes.
pub(crate) fn line(report: &Report) -> String {
    let here: Vec<&SiteReport> = report.sites.iter().filter(|site| site.state != "away").collect();
    let rate: f64 = here.iter().map(|site| site.tokens_per_second).sum();
    if report.state == "standby" {
        let gave = (report.given > 0).then(|| format!(", gave {:.1} MB to joining sites", report.given as f64 / 1e6));
        return format!("standing by at {}{}", plural(report.commits, "commit"), gave.unwrap_or_default());
    }
    let mut facts = vec![format!("{:.0}%", report.progress * 100.0), plural(report.commits, "commit")];
    facts.extend(report.loss.last.map(|loss| format!("loss {loss:.3}")));
    facts.extend(report.bits_per_byte.last.map(|bits| format!("{bits:.2} bits/byte")));
    if report.state == "training" {
        facts.extend([format!("{} tok/s", count(rate)), plural(here.len() as u64, "site")]);
        facts.extend(report.seconds_left.map(|left| format!("{} left", duration(left))));
    } else {
        facts.push(format!("{} after {}", report.state, duration(report.seconds)));
    }
    facts.join(" · ")
}

/// What synchronization costs a site and what its work is worth to the others.
pub(crate) fn synchronization(site: &SiteReport) -> String {
    [
        format!("{:.1} s exposed, {:.1} s hidden", site.exposed_seconds, site.hidden_seconds),
        format!("round {:.2} s (expected {:.2})", site.round_seconds, site.round_seconds_expected),
        format!("↑ {} a contribution", bytes(site.contribution_bytes)),
        format!("{} ↑ {} ↓ in payloads", bytes(site.payload_sent), bytes(site.payload_received)),
        format!("staleness {:.2}", site.staleness),
        format!("cosine to consensus {:.2}", site.cosine),
    ]
    .join(" · ")
}

/// What the latest round of a fragment showed.
pub(crate) fn round(fragment: &FragmentReport) -> String {
    [
        format!("version {}", fragment.version),
        format!("{} after {:.2} s", plural(fragment.quorum as u64, "contribution"), fragment.round_seconds),
        format!("ρ {:.2}, effective step {:.2}", fragment.rho, fragment.effective_step),
        format!("length {:.3}, undelivered {:.3}", fragment.norm, fragment.residual),
        format!("{} ↓", bytes(fragment.bytes)),
    ]
    .join(" · ")
}

// ---- words and numbers ----

fn colour(state: &str) -> Color {
    match state {
        "training" | "finished" => Color::Green,
        "loading" | "closing" => Color::Yellow,
        "silent" | "away" | "stopped" => Color::Red,
        _ => Color::Reset,
    }
}

/// As many of the facts as fit, the first in any case.
fn fit(facts: &[String], width: u16) -> String {
    let fits = |facts: &&[String]| facts.join(" · ").chars().count() <= usize::from(width);
    let most = (2..=facts.len()).rev().map(|number| &facts[..number]).find(fits);
    most.unwrap_or(&facts[..1]).join(" · ")
}

fn clip(text: &str, width: u16) -> String {
    match text.chars().count() > usize::from(width) {
        true => text.chars().take(usize::from(width).saturating_sub(1)).chain(['…']).collect(),
        false => text.to_string(),
    }
}

/// Equal texts once, with their number.
fn tally(texts: &[String]) -> Vec<String> {
    let number = |text: &String| texts.iter().filter(|other| *other == text).count();
    let first = |&(index, text): &(usize, &String)| !texts[..index].contains(text);
    texts.iter().enumerate().filter(first).map(|(_, text)| format!("{}× {text}", number(text))).collect()
}

fn plural(number: u64, noun: &str) -> String {
    format!("{number} {noun}{}", if number == 1 { "" } else { "s" })
}

fn from_to(value: FirstLast) -> String {
    match (value.first, value.last) {
        (Some(first), Some(last)) if first != last => format!("{first:.3} → {last:.3}"),
        (_, Some(last)) => format!("{last:.3}"),
        (_, None) => "–".to_string(),
    }
}

/// Three digits at most and a unit, of which each is `base` times the one before.
fn scaled(mut value: f64, base: f64, units: &[&str]) -> String {
    let mut unit = 0;
    while value >= base - 0.5 && unit + 1 < units.len() {
        (value, unit) = (value / base, unit + 1);
    }
    let digits = usize::from(unit > 0 && value < 99.95);
    format!("{value:.digits$} {}", units[unit]).trim_end().to_string()
}

fn count(value: f64) -> String {
    scaled(value, 1000.0, &["", "k", "M", "G", "T"])
}

/// A number of bytes for people.
pub(crate) fn bytes(value: u64) -> String {
    scaled(value as f64, 1024.0, &["B", "KiB", "MiB", "GiB", "TiB"])
}

fn duration(seconds: f64) -> String {
    let seconds = seconds.round() as u64;
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m {:02}s", seconds / 60, seconds % 60),
        3600..86_400 => format!("{}h {:02}m", seconds / 3600, seconds / 60 % 60),
        _ => format!("{}d {:02}h", seconds / 86_400, seconds / 3600 % 24),
    }
}

/// The history as bars of height 1 to 16, evenly in time, at most `width` of them.
fn heights(history: &[(f64, f64)], width: u16) -> Vec<u64> {
    let points: Vec<(f64, f64)> = history.iter().copied().filter(|(_, loss)| loss.is_finite()).collect();
    let (Some((first, _)), Some((last, _))) = (points.first(), points.last()) else { return Vec::new() };
    let bars = points.len().min(usize::from(width));
    let until = |share: f64| points.partition_point(|(at, _)| *at <= first + (last - first) * share);
    let mean = |bar: usize| {
        let (from, to) = (until(bar as f64 / bars as f64), until((bar + 1) as f64 / bars as f64));
        let (from, to) = (from.min(to.max(1) - 1), to.max(1));
        points[from..to].iter().map(|(_, loss)| loss).sum::<f64>() / (to - from) as f64
    };
    let means: Vec<f64> = (0..bars).map(mean).collect();
    let low = means.iter().copied().fold(f64::INFINITY, f64::min);
    let span = means.iter().map(|mean| mean - low).fold(f64::MIN_POSITIVE, f64::max);
    means.iter().map(|mean| 1 + ((mean - low) / span * 15.0).round() as u64).collect()
}

#[cfg(test)]
mod tests {
    use atoll_core::hash::Digest;
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    use super::*;

    fn site(name: &str, device: &str, state: &str) -> SiteReport {
        SiteReport {
            name: name.to_string(),
            engine: "cpu".to_string(),
            device: device.to_string(),
            state: state.to_string(),
            tokens: 2_130_000,
            steps: 1204,
            tokens_per_second: 2100.0,
            utilization: 0.874,
            bytes_sent: 13_000_000,
            bytes_received: 52_500,
            ..SiteReport::default()
        }
    }

    fn report() -> Report {
        Report {
            run: "harbour".to_string(),
            state: "training".to_string(),
            parameters: 4_100_000,
            tokens: 12_600_000,
            commits: 34,
            digest: Digest::of(b"model"),
            loss: FirstLast { first: Some(10.4213), last: Some(5.123) },
            bits_per_byte: FirstLast { first: Some(4.982), last: Some(2.41) },
            progress: 0.42,
            seconds_left: Some(490.0),
            rounds: ["waits for contributions", "is being merged", "waits for contributions"].map(String::from).into(),
            sites: vec![
                site("north", "AVX-512, 16 threads", "training"),
                site("south", "AVX2\x1b[2J", "loading"),
                site("west", "AVX2", "away"),
            ],
            history: (0..200).map(|at| (f64::from(at), 5.0 + 5.4 * (-0.03 * f64::from(at)).exp())).collect(),
            ..Report::default()
        }
    }

    fn picture(report: &Report, width: u16, height: u16) -> String {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| paint(report, frame.area(), frame.buffer_mut())).unwrap();
        let text = terminal.backend().to_string();
        text.lines().map(|line| line.trim_matches('"').trim_end()).collect::<Vec<_>>().join("\n")
    }

    #[test]
    fn a_run_and_its_sites() {
        let expected = "\
harbour · 4.1 M parameters · 12.6 M tokens · model ccca53791b                             ● training
━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━───────────────────────────────────────────────   42%  8m 10s left
loss       10.421 → 5.123  █▇▆▅▄▃▂▁▁
bits/byte  4.982 → 2.410   ███████████▇▇▆▆▅▅▅▄▄▄▄▃▃▃▃▃▃▂▂▂▂▂▂▂▂▂▂▂▂▂▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁
rounds     34 commits · 2× waits for contributions · 1× is being merged

site   device                   state       tok/s  steps  tokens  busy      ↑ up    ↓ down
north  cpu AVX-512, 16 threads  ● training  2.1 k   1204   2.1 M   87%  12.4 MiB  51.3 KiB
south  cpu AVX2[2J              ● loading   2.1 k   1204   2.1 M   87%  12.4 MiB  51.3 KiB
west   cpu AVX2                 ● away          –   1204   2.1 M   87%  12.4 MiB  51.3 KiB";
        assert_eq!(picture(&report(), 100, 10), expected);
    }

    #[test]
    fn little_room() {
        let mut report = report();
        let titles = "site   device        state       tok/s  steps  tokens  busy      ↑ up    ↓ down\n";
        assert!(picture(&report, 79, 10).contains(titles));
        assert!(picture(&report, 40, 10).contains("site   state       tok/s  steps  tokens\n"));
        report.sites[1].digest_mismatches = 3;
        assert!(picture(&report, 50, 10).contains("mismatches"));
        report.sites = (0..20).map(|index| site(&format!("s{index}"), "AVX2", "training")).collect();
        assert!(picture(&report, 79, 15).ends_with("… and 13 more"));
        for (width, height) in (1..130).flat_map(|width| (1..12).map(move |height| (width, height))) {
            picture(&report, width, height);
            picture(&Report::default(), width, height);
        }
    }

    #[test]
    fn a_picture_takes_the_place_of_the_last() {
        let area = Rect::new(0, 0, 20, 2);
        let (old, mut new) = (Buffer::with_lines(["a".repeat(20), "b".to_string()]), Buffer::empty(area));
        new.set_string(0, 0, "日本 on", Style::new());
        new.set_string(0, 1, "on", Style::new().green());
        let sent = |columns| String::from_utf8(replace(&old, columns, "he\x1b[2Jllo\n", &new).unwrap()).unwrap();
        let rest = "\x1b[1G\x1b[Jhe[2Jllo\r\n日本 on\x1b[K\r\n\x1b[38;5;2mon\x1b[39m\x1b[K\r\n\x1b[J";
        assert_eq!(sent(80), format!("\x1b[2A{rest}"));
        assert_eq!(sent(10), format!("\x1b[3A{rest}"));
    }

    #[test]
    fn one_line() {
        let facts = "42% · 34 commits · loss 5.123 · 2.41 bits/byte · 4.2 k tok/s · 2 sites · 8m 10s left";
        assert_eq!(line(&report()), facts);
        let stopped = Report { state: "stopped".to_string(), commits: 1, seconds: 61.0, ..Report::default() };
        assert_eq!(line(&stopped), "0% · 1 commit · stopped after 1m 01s");
    }

    #[test]
    fn numbers() {
        let counts = [0.0, 999.4, 999.7, 4_100_000.0, 99_960.0, 999_600.0, 2e15].map(count);
        assert_eq!(counts, ["0", "999", "1.0 k", "4.1 M", "100 k", "1.0 M", "2000 T"]);
        assert_eq!([0, 1023, 1024, 13_000_000].map(bytes), ["0 B", "1023 B", "1.0 KiB", "12.4 MiB"]);
        let times = [f64::NAN, 59.4, 59.6, 490.0, 11_100.0, 187_200.0].map(duration);
        assert_eq!(times, ["0s", "59s", "1m 00s", "8m 10s", "3h 05m", "2d 04h"]);
        assert_eq!(heights(&[(0.0, 4.0), (1.0, f64::NAN), (2.0, 3.0), (3.0, 1.0)], 80), [16, 11, 1]);
        assert_eq!(heights(&[(0.0, 4.0), (1.0, 2.0), (2.0, 1.0), (3.0, 1.0)], 2), [16, 1]);
        assert_eq!((heights(&[(0.0, 4.0)], 80), heights(&[(0.0, 4.0)], 0)), (vec![1], vec![]));
    }
}
