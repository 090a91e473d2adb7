//! The tasks and threads of the service, each under a name and watched: one that ends before the service does ends it.

use std::collections::HashMap;
use std::io;

use tokio::sync::oneshot;
use tokio::task::{AbortHandle, Id, JoinError, JoinSet};
use tokio::time::Instant;

use super::ServiceError;
use crate::faults;
use crate::queue::QueueError;

#[derive(Default)]
pub(super) struct Tasks {
    running: JoinSet<Result<(), ServiceError>>,
    names: HashMap<Id, &'static str>,
    /// Those that never end by themselves.
    servers: Vec<AbortHandle>,
}

impl Tasks {
    /// Starts a task that runs until it is aborted: it has nothing to finish.
    pub(super) fn spawn_server(&mut self, name: &'static str, serving: impl Future<Output = ()> + Send + 'static) {
        let server = self.spawn(name, async move {
            serving.await;
            Ok(())
        });
        self.servers.push(server);
    }

    /// Starts a task that ends by itself once it is told to.
    pub(super) fn spawn_worker(
        &mut self,
        name: &'static str,
        working: impl Future<Output = Result<(), QueueError>> + Send + 'static,
    ) {
        self.spawn(name, async move { working.await.map_err(ServiceError::from) });
    }

    /// Starts a thread that ends by itself once it is told to.
    pub(super) fn spawn_thread(
        &mut self,
        name: &'static str,
        run: impl FnOnce() -> Result<(), QueueError> + Send + 'static,
    ) -> io::Result<()> {
        let (sender, ended) = oneshot::channel();
        std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            // Nobody listens any more when it ended too late.
            let _ = sender.send(run());
        })?;
        // A sender that is gone without a word: the thread has panicked.
        self.spawn(name, async move {
            ended.await.map_or(Err(ServiceError::Ended(name)), |result| result.map_err(ServiceError::from))
        });
        Ok(())
    }

    fn spawn(
        &mut self,
        name: &'static str,
        task: impl Future<Output = Result<(), ServiceError>> + Send + 'static,
    ) -> AbortHandle {
        let task = self.running.spawn(async move {
            faults::reach_task(name);
            task.await
        });
        self.names.insert(task.id(), name);
        task
    }

    /// Waits until one ends, which none should. Says which and why.
    pub(super) async fn first_end(&mut self) -> ServiceError {
        match self.running.join_next_with_id().await {
            Some(ended) => match self.note_end(ended) {
                (_, Err(error)) => error,
                (name, Ok(())) => ServiceError::Ended(name),
            },
            None => std::future::pending().await,
        }
    }

    /// Waits until all have ended, the servers by being aborted. The names of those that have not by `deadline`, which are
    /// left behind, and the first error.
    pub(super) async fn end(mut self, deadline: Instant) -> (Vec<&'static str>, Result<(), ServiceError>) {
        self.servers.iter().for_each(AbortHandle::abort);
        let mut result = Ok(());
        while let Ok(Some(ended)) = tokio::time::timeout_at(deadline, self.running.join_next_with_id()).await {
            result = result.and(self.note_end(ended).1);
        }
        let mut late: Vec<&'static str> = self.names.into_values().collect();
        late.sort_unstable();
        (late, result)
    }

    fn note_end(
        &mut self,
        ended: Result<(Id, Result<(), ServiceError>), JoinError>,
    ) -> (&'static str, Result<(), ServiceError>) {
        let (id, result) = match ended {
            Ok((id, result)) => (id, Some(result)),
            Err(error) if error.is_cancelled() => (error.id(), Some(Ok(()))),
            Err(error) => (error.id(), None),
        };
        let name = self.names.remove(&id).unwrap_or("a task");
        (name, result.unwrap_or(Err(ServiceError::Ended(name))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name_of(error: &ServiceError) -> &'static str {
        match error {
            ServiceError::Ended(name) => name,
            other => panic!("{other}"),
        }
    }

    #[tokio::test]
    async fn whatever_ends_or_panics_is_named() {
        for kind in ["ends", "panics", "thread ends", "thread panics"] {
            let mut tasks = Tasks::default();
            tasks.spawn_server("goes on", std::future::pending());
            match kind {
                "ends" => tasks.spawn_server("one", async {}),
                "panics" => tasks.spawn_server("one", async { panic!("as it must") }),
                "thread ends" => tasks.spawn_thread("one", || Ok(())).unwrap(),
                _ => tasks.spawn_thread("one", || panic!("as it must")).unwrap(),
            }
            assert_eq!(name_of(&tasks.first_end().await), "one", "{kind}");
        }
    }

    #[tokio::test]
    async fn an_error_of_the_queue_is_handed_on() {
        let mut tasks = Tasks::default();
        tasks.spawn_worker("one", async { Err(QueueError::Closed) });
        assert!(matches!(tasks.first_end().await, ServiceError::Queue(QueueError::Closed)));
    }

    #[tokio::test]
    async fn at_the_end_servers_are_aborted_and_who_is_late_is_named() {
        let mut tasks = Tasks::default();
        let (stop, stopped) = oneshot::channel::<()>();
        tasks.spawn_server("server", std::future::pending());
        tasks.spawn_worker("worker", async {
            let _ = stopped.await;
            Ok(())
        });
        tasks.spawn_worker("late", std::future::pending());
        drop(stop);
        let (late, result) = tasks.end(Instant::now() + std::time::Duration::from_secs(1)).await;
        assert_eq!(late, ["late"]);
        assert!(result.is_ok());
    }

    #[tokio::test]
    async fn a_panic_during_the_end_is_an_error() {
        let mut tasks = Tasks::default();
        let (stop, stopped) = oneshot::channel::<()>();
        tasks.spawn_worker("worker", async {
            let _ = stopped.await;
            panic!("as it must")
        });
        drop(stop);
        let (late, result) = tasks.end(Instant::now() + std::time::Duration::from_secs(60)).await;
        assert_eq!((late.len(), name_of(&result.unwrap_err())), (0, "worker"));
    }
}
