//! The storm as a picture: a lane for each coordinator and site with its faults as coloured spans, a tick for each commit,
//! and tokens per second over time. Plain SVG, written by hand; it follows the reader's colours, light or dark.

use std::fmt::Write;
use std::path::Path;

use anyhow::Result;

use super::COORDINATORS;
use super::evidence::Evidence;
use super::storm::{KINDS, Kind};
use super::verdict::{commits, context, tokens};

/// Pixels: of the picture, up to where its lanes go and from where, of a lane, of the curve.
const WIDTH: f64 = 1500.0;
const RIGHT: f64 = WIDTH - 30.0;
const LEFT: f64 = 90.0;
const LANE: f64 = 30.0;
const CURVE: f64 = 130.0;
const TOP: f64 = 44.0;
/// Seconds that a point of the curve sums up.
const POINT_SECONDS: f64 = 5.0;

const STYLE: &str = "\
    text { font: 12px system-ui, sans-serif; fill: #333 } .faint { stroke: #ddd } .tick { stroke: #667 } \
    .line { fill: none; stroke: #2563eb; stroke-width: 1.5 } .calm { stroke: #888; stroke-dasharray: 4 4 } \
    .page { fill: #fff } \
    @media (prefers-color-scheme: dark) { text { fill: #ddd } .faint { stroke: #333 } .tick { stroke: #99a } \
    .line { stroke: #60a5fa } .page { fill: #111 } }";

fn colour(kind: Kind) -> &'static str {
    match kind {
        Kind::KillSite | Kind::KillLeader => "#dc2626",
        Kind::PauseSite | Kind::PauseLeader => "#d97706",
        Kind::CutSite => "#7c3aed",
        Kind::SlowSite => "#0d9488",
    }
}

/// Draws it.
pub(super) fn draw(path: &Path, evidence: &Evidence) -> Result<()> {
    Ok(std::fs::write(path, picture(evidence))?)
}

/// Seconds of the storm to pixels.
struct Scale {
    begin: f64,
    pixels_per_second: f64,
}

impl Scale {
    fn x(&self, at: f64) -> f64 {
        (LEFT + (at - self.begin) * self.pixels_per_second).clamp(LEFT, RIGHT)
    }
}

fn picture(evidence: &Evidence) -> String {
    let (begin, end) = evidence.notes.storm;
    let scale = Scale { begin, pixels_per_second: (RIGHT - LEFT) / (end - begin) };
    let names = evidence.sites.iter().map(|site| site.name.as_str());
    let places: Vec<&str> = COORDINATORS.into_iter().chain(names).collect();
    let ticks = TOP + LANE * places.len() as f64;
    let curve = ticks + LANE + 10.0;
    let height = curve + CURVE + 30.0;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" \
         aria-label=\"Faults, commits and tokens per second of a storm\">\n<style>{STYLE}</style>\n\
         <rect class=\"page\" width=\"{WIDTH}\" height=\"{height}\"/>\n"
    );
    legend(&mut svg);
    for (index, place) in places.iter().enumerate() {
        lane(&mut svg, evidence, &scale, place, TOP + LANE * index as f64);
    }
    commit_ticks(&mut svg, evidence, &scale, ticks);
    curve_of_tokens(&mut svg, evidence, &scale, curve);
    minutes(&mut svg, &scale, (begin, end), curve + CURVE);
    svg.push_str("</svg>\n");
    svg
}

// A picture in memory takes whatever is written to it: the results of `write!` say nothing.

fn legend(svg: &mut String) {
    let mut x = LEFT;
    for (kind, ..) in KINDS.iter().filter(|(kind, ..)| !kind.is_of_leader()) {
        let name = kind.to_string().replace("site ", "").replace("at ", "");
        let _ =
            writeln!(svg, "<rect x=\"{x}\" y=\"14\" width=\"14\" height=\"14\" rx=\"2\" fill=\"{}\"/>", colour(*kind));
        let _ = writeln!(svg, "<text x=\"{}\" y=\"26\">{name}</text>", x + 20.0);
        x += 110.0;
    }
}

fn lane(svg: &mut String, evidence: &Evidence, scale: &Scale, place: &str, y: f64) {
    let _ = writeln!(svg, "<text x=\"8\" y=\"{}\">{place}</text>", y + 19.0);
    let _ = writeln!(
        svg,
        "<line class=\"faint\" x1=\"{LEFT}\" x2=\"{}\" y1=\"{}\" y2=\"{}\"/>",
        RIGHT,
        y + LANE / 2.0,
        y + LANE / 2.0
    );
    for fault in evidence.notes.faults.iter().filter(|fault| fault.place == place) {
        let (from, to) = (scale.x(fault.began), scale.x(fault.ended));
        let (inset, opacity) = if fault.kind == Kind::SlowSite { (10.0, 0.6) } else { (5.0, 1.0) };
        let _ = writeln!(
            svg,
            "<rect x=\"{from:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{:.1}\" rx=\"2\" fill=\"{}\" opacity=\"{opacity}\">\
             <title>{}: {}, {:.0} s to {:.0} s</title></rect>",
            y + inset,
            (to - from).max(2.0),
            LANE - 2.0 * inset,
            colour(fault.kind),
            place,
            fault.kind,
            fault.began - scale.begin,
            fault.ended - scale.begin
        );
    }
}

fn commit_ticks(svg: &mut String, evidence: &Evidence, scale: &Scale, y: f64) {
    let _ = writeln!(svg, "<text x=\"8\" y=\"{}\">commits</text>", y + 19.0);
    let storm = evidence.notes.storm;
    let inside = commits(&evidence.entries).into_iter().filter(|(at, _)| storm.0 < *at && *at <= storm.1);
    let path: String = inside.map(|(at, _)| format!("M{:.1} {:.0}v16", scale.x(at), y + 7.0)).collect();
    let _ = writeln!(svg, "<path class=\"tick\" stroke-width=\"0.6\" d=\"{path}\"/>");
}

fn curve_of_tokens(svg: &mut String, evidence: &Evidence, scale: &Scale, y: f64) {
    let (commits, context, storm) = (commits(&evidence.entries), context(&evidence.entries), evidence.notes.storm);
    let calm = tokens(&commits, context, evidence.notes.calm) / (evidence.notes.calm.1 - evidence.notes.calm.0);
    let points = ((storm.1 - storm.0) / POINT_SECONDS) as usize;
    let rate = |index: usize| {
        let from = storm.0 + index as f64 * POINT_SECONDS;
        (from + POINT_SECONDS / 2.0, tokens(&commits, context, (from, from + POINT_SECONDS)) / POINT_SECONDS)
    };
    let rates: Vec<(f64, f64)> = (0..points).map(rate).collect();
    let most = rates.iter().map(|(_, rate)| *rate).fold(calm, f64::max).max(1.0);
    let height = |rate: f64| y + CURVE - rate / most * (CURVE - 10.0);
    let line: Vec<String> =
        rates.iter().map(|(at, rate)| format!("{:.1},{:.1}", scale.x(*at), height(*rate))).collect();
    let _ = writeln!(svg, "<text x=\"8\" y=\"{}\">tokens/s</text>", y + 19.0);
    let _ = writeln!(svg, "<text x=\"8\" y=\"{:.0}\">{:.0}</text>", height(calm) + 4.0 + 14.0, calm);
    let level = height(calm);
    let _ = writeln!(
        svg,
        "<line class=\"calm\" x1=\"{LEFT}\" x2=\"{}\" y1=\"{level:.1}\" y2=\"{level:.1}\"><title>without faults</title></line>",
        RIGHT
    );
    let _ = writeln!(svg, "<polyline class=\"line\" points=\"{}\"/>", line.join(" "));
}

fn minutes(svg: &mut String, scale: &Scale, storm: (f64, f64), y: f64) {
    let _ = writeln!(svg, "<line class=\"faint\" x1=\"{LEFT}\" x2=\"{}\" y1=\"{y}\" y2=\"{y}\"/>", RIGHT);
    let every = if storm.1 - storm.0 > 600.0 { 300 } else { 60 };
    for seconds in (0..=(storm.1 - storm.0) as u32).step_by(every) {
        let x = scale.x(storm.0 + f64::from(seconds));
        let _ =
            writeln!(svg, "<text x=\"{x:.0}\" y=\"{}\" text-anchor=\"middle\">{} min</text>", y + 18.0, seconds / 60);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chaos::evidence::SiteEvidence;
    use crate::chaos::weather::{Happened, Notes};

    #[test]
    fn a_fault_is_a_span_in_its_places_lane() {
        let fault = Happened { kind: Kind::CutSite, place: "site-1".to_string(), began: 150.0, ended: 160.0 };
        let notes = Notes { calm: (0.0, 100.0), storm: (100.0, 200.0), faults: vec![fault], ..Notes::default() };
        let site = SiteEvidence { name: "site-1".to_string(), moments: Vec::new(), told: Vec::new() };
        let evidence = Evidence { notes, entries: Vec::new(), sites: vec![site], gone: Vec::new() };
        let svg = picture(&evidence);
        assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n") && !svg.contains("NaN"));
        let middle = f64::midpoint(LEFT, RIGHT);
        let lane = TOP + 2.0 * LANE + 5.0;
        assert!(svg.contains(&format!("<rect x=\"{middle:.1}\" y=\"{lane:.1}\" width=\"138.0\"")), "{svg}");
        assert!(svg.contains("site-1: site cut off, 50 s to 60 s"));
    }
}
