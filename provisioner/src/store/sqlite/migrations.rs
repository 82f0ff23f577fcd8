//! The tables' history, compiled in.
//!
//! sqlx's own macro would do this at the price of building SQLite a second time, for the compiler.

use std::borrow::Cow;

use sqlx::SqlSafeStr as _;
use sqlx::migrate::{Migration, MigrationType, Migrator};

/// Files of `migrations/sqlite`, oldest first: number, name, content. One that has been released never changes; its digest is in the
/// databases.
const FILES: [(i64, &str, &str); 2] = [
    (1, "environments", include_str!("../../../migrations/sqlite/0001_environments.sql")),
    (2, "rollouts", include_str!("../../../migrations/sqlite/0002_rollouts.sql")),
];

/// What brings any older database up to date.
pub(super) fn all() -> Migrator {
    let migration = |(number, name, sql): (i64, &'static str, &'static str)| {
        Migration::new(number, Cow::Borrowed(name), MigrationType::Simple, sql.into_sql_str(), false)
    };
    Migrator::with_migrations(FILES.map(migration).to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_file_there_is_is_compiled_in_under_its_number_and_name() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/migrations/sqlite");
        let mut there: Vec<(String, String)> = std::fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .map(|path| {
                (path.file_name().unwrap().to_str().unwrap().to_owned(), std::fs::read_to_string(path).unwrap())
            })
            .collect();
        there.sort();
        let compiled: Vec<(String, String)> =
            FILES.iter().map(|(number, name, sql)| (format!("{number:04}_{name}.sql"), (*sql).to_owned())).collect();
        assert_eq!(compiled, there);
    }

    #[test]
    fn a_database_made_before_is_recognised() {
        let digests: Vec<String> = all().iter().map(|migration| hex::encode(&migration.checksum)).collect();
        // As they stand in databases out there.
        assert_eq!(
            digests,
            [
                "a172d2d341f900ee8638d345b6f1bbfc01ca7acddeced2b0de4ebb94db40f147ffefa41ad9dc739fec39d67a82e40d68",
                "38029c6ee04e4ed91b0d43dfe8ed0ca4d99e9f17c548d1e5d706f92b2fe7f0dea955a7dd90d91a465ed22e0542296123",
            ]
        );
    }
}
