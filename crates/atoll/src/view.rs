//! stand-in until the view lands
use atoll_node::report::Report;
pub(crate) struct View;
impl View {
    pub(crate) fn open(_sites: usize) -> Option<View> {
        None
    }
    pub(crate) fn draw(&mut self, _: &Report) -> std::io::Result<()> {
        Ok(())
    }
    pub(crate) fn say(&mut self, _: &str) -> std::io::Result<()> {
        Ok(())
    }
    pub(crate) fn close(self) {}
}
pub(crate) fn line(report: &Report) -> String {
    format!(
        "{:.0}% {} commits loss {:?} bpb {:?}",
        report.progress * 100.0,
        report.commits,
        report.loss.last,
        report.bits_per_byte.last
    )
}
