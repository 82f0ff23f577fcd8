//! Base images of droplets: what each slug holds, and building it once per machine.
//!
//! A base image is a Debian root file system put together by `mmdebstrap` and imported into the Docker Engine under a tag that is a
//! digest of everything it was made from, so an unchanged recipe is never built twice and a changed one never reuses an old image.
//! Knows nothing of droplets or of the API.

mod build;
mod package_source;
mod recipe;

pub use build::{BuildError, Built, ImageStore, ensure};
pub use package_source::{PackageSource, PackageSourceError};
pub use recipe::{RECIPES, Recipe, find};
