//! `--precision`: what an engine multiplies matrices in.

use std::fmt;

use atoll_cpu::Precision;

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::Args)]
#[group(skip)]
pub(crate) struct Arguments {
    /// What matrix products are computed in; sums and weights are f32 in any case.
    #[arg(long, value_enum, default_value_t)]
    precision: Wish,
}

/// What an operator wants factors of matrix products rounded to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Wish {
    /// bf16 where the processor has instructions for it, else f32; on GPUs f32.
    #[default]
    Auto,
    /// Factors in f32: processors differ by the rounding of sums alone.
    F32,
    /// Factors rounded to bf16: faster where the processor has instructions for it.
    Bf16,
}

impl Arguments {
    /// As it was said.
    pub(crate) fn wish(self) -> Wish {
        self.precision
    }

    /// What the engine is to use on this machine; says so if that will be slow.
    pub(crate) fn resolve(self) -> Precision {
        if self.precision == Wish::Bf16 && Precision::best() != Precision::Bf16 {
            eprintln!("bf16 products take a slower path here: this processor has no instructions for them");
            eprintln!("hint: --precision f32 is faster");
        }
        match self.precision {
            Wish::Auto => Precision::best(),
            Wish::F32 => Precision::F32,
            Wish::Bf16 => Precision::Bf16,
        }
    }

    /// The same wish for another subcommand.
    pub(crate) fn words(self) -> [String; 2] {
        ["--precision".to_string(), self.precision.to_string()]
    }
}

impl fmt::Display for Wish {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        })
    }
}

/// Its name, as in `--precision`.
pub(crate) fn name(precision: Precision) -> &'static str {
    match precision {
        Precision::F32 => "f32",
        Precision::Bf16 => "bf16",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        arguments: Arguments,
    }

    fn parse(words: &[&str]) -> Arguments {
        Line::parse_from([&["join"], words].concat()).arguments
    }

    #[test]
    fn a_wish_is_passed_on_unchanged() {
        assert_eq!(parse(&[]).resolve(), Precision::best());
        for (word, precision) in [("auto", Precision::best()), ("f32", Precision::F32), ("bf16", Precision::Bf16)] {
            let arguments = parse(&["--precision", word]);
            assert_eq!((arguments.resolve(), arguments.words()), (precision, ["--precision", word].map(String::from)));
        }
        assert!(Line::try_parse_from(["join", "--precision", "f16"]).is_err());
    }
}
