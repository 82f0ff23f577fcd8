//! One transaction on the connection that writes.
//!
//! Not sqlx's: where SQLite undoes a transaction by itself, as it does when the disk is full, sqlx goes on counting it as open. From then on
//! what it takes for transactions are savepoints in one that nobody ever commits: every write succeeds and none is on disk. Here a
//! connection on which anything went wrong is closed, and with it goes whatever it had begun.

use sqlx::pool::PoolConnection;
use sqlx::{Sqlite, SqliteConnection, SqlitePool};

/// An open transaction. Dropped before its end, it is undone by closing the connection.
pub(super) struct Writing {
    connection: PoolConnection<Sqlite>,
    over: bool,
}

impl Writing {
    /// Waits for its turn, and for whoever else holds the database's lock.
    pub(super) async fn begin(writer: &SqlitePool) -> Result<Self, sqlx::Error> {
        let mut writing = Self { connection: writer.acquire().await?, over: false };
        writing.say("BEGIN IMMEDIATE").await?;
        Ok(writing)
    }

    /// For the statements in it.
    pub(super) fn connection(&mut self) -> &mut SqliteConnection {
        &mut self.connection
    }

    /// On disk once this has answered.
    pub(super) async fn commit(mut self) -> Result<(), sqlx::Error> {
        self.say("COMMIT").await?;
        self.over = true;
        Ok(())
    }

    /// Nothing of it was written.
    pub(super) async fn undo(mut self) -> Result<(), sqlx::Error> {
        self.say("ROLLBACK").await?;
        self.over = true;
        Ok(())
    }

    async fn say(&mut self, statement: &'static str) -> Result<(), sqlx::Error> {
        sqlx::query(statement).execute(&mut *self.connection).await.map(drop)
    }
}

impl Drop for Writing {
    fn drop(&mut self) {
        if !self.over {
            self.connection.close_on_drop();
        }
    }
}
