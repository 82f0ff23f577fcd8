use dtma_api::instance::Transport;
use proptest::prelude::*;

use super::*;
use crate::instance::SessionMode;
use crate::reconcile::tests::introduction;

/// A clock of one's own.
#[derive(Clone, Copy)]
struct Clock(Moment);

impl Clock {
    fn new() -> Self {
        Self(Moment { instant: Instant::now(), time: Timestamp::from_second(1_000_000).unwrap() })
    }

    fn pass(&mut self, seconds: u64) {
        self.0.instant += Duration::from_secs(seconds);
        self.0.time += jiff::SignedDuration::from_secs(seconds.cast_signed());
    }
}

fn process(container: &str, since: Timestamp) -> Process {
    let at = Upstream {
        instance: "one".parse().unwrap(),
        container: ContainerId(container.to_owned()),
        transport: Transport::Http,
        sessions: SessionMode::Shared,
        address: ([172, 30, 0, 2], 8080).into(),
        path: "/mcp".to_owned(),
    };
    Process { container: ContainerId(container.to_owned()), since, at }
}

/// A supervisor, its clock, and the process it watches.
struct Scene {
    supervisor: Supervisor,
    clock: Clock,
    check: HealthCheck,
    timing: Timing,
    process: Option<Process>,
    calls: Vec<Instant>,
}

impl Scene {
    /// A process that has just started.
    fn new(check: HealthCheck) -> Self {
        let clock = Clock::new();
        let process = Some(process("a", clock.0.time));
        let (supervisor, timing) = (Supervisor::default(), Timing::default());
        let mut scene = Self { supervisor, clock, check, timing, process, calls: Vec::new() };
        scene.observe();
        scene
    }

    fn observe(&mut self) {
        self.supervisor.observe(self.process.clone(), &self.check, &self.timing, self.clock.0);
    }

    /// The agent, or somebody, has started it anew.
    fn started_anew(&mut self) {
        self.supervisor.observe(None, &self.check, &self.timing, self.clock.0);
        self.clock.pass(1);
        self.process = Some(process("a", self.clock.0.time));
        self.observe();
    }

    /// Waits for the next probe and answers it.
    fn probe(&mut self, answer: Result<Answer, &str>) -> Heard {
        let (at, _) = self.supervisor.next();
        let wait = at.expect("a probe is due some time").saturating_duration_since(self.clock.0.instant);
        self.clock.pass(wait.as_secs() + 1);
        let due = self.supervisor.due(self.clock.0.instant).expect("it is due");
        assert_eq!(self.supervisor.due(self.clock.0.instant), None, "one at a time");
        self.answer(due.round, answer)
    }

    fn answer(&mut self, round: u64, answer: Result<Answer, &str>) -> Heard {
        let answer = answer.map_err(|reason| ProbeFailure { reason: reason.to_owned() });
        self.supervisor.answered(round, answer, &self.calls, &self.timing, self.clock.0)
    }

    fn health(&self) -> Health {
        self.supervisor.shown(self.clock.0.instant).0
    }

    fn reason(&self) -> String {
        self.supervisor.shown(self.clock.0.instant).1.unwrap_or_default()
    }

    /// Fails until it is unhealthy; what was told then.
    fn hang(&mut self) -> News {
        for _ in 0..1000 {
            if let Heard::Fails(Some(news)) = self.probe(silence()) {
                return news;
            }
        }
        panic!("it never became unhealthy")
    }

    /// Waits for its restart; how long that took.
    fn until_restart(&mut self) -> Duration {
        let (_, at) = self.supervisor.next();
        let wait = at.expect("it is restarted some time").saturating_duration_since(self.clock.0.instant);
        assert!(!self.supervisor.is_to_be_restarted(self.clock.0.instant) || wait.is_zero());
        self.clock.0.instant += wait;
        self.clock.0.time += jiff::SignedDuration::try_from(wait).unwrap();
        assert!(self.supervisor.is_to_be_restarted(self.clock.0.instant));
        wait
    }

    fn restart(&mut self) -> String {
        let told = self.supervisor.restarting(&self.timing, self.clock.0.instant);
        assert!(!self.supervisor.is_to_be_restarted(self.clock.0.instant));
        self.started_anew();
        told
    }
}

fn introduced() -> Result<Answer, &'static str> {
    Ok(Answer::Introduced(Box::new(introduction(false))))
}

fn silence() -> Result<Answer, &'static str> {
    Err("it did not answer within 5 seconds")
}

fn quick() -> HealthCheck {
    HealthCheck { start_period_seconds: 1, ..HealthCheck::default() }
}

#[test]
fn a_server_has_its_start_period_to_begin_to_answer_and_is_asked_often_meanwhile() {
    let mut scene = Scene::new(HealthCheck::default());
    assert_eq!(scene.health(), Health::Starting);
    let begun = scene.clock.0.instant;
    let mut probes = 0;
    while scene.clock.0.instant.saturating_duration_since(begun) < Duration::from_secs(87) {
        assert_eq!(scene.probe(silence()), Heard::Fails(None));
        assert_eq!((scene.health(), scene.reason().as_str()), (Health::Starting, "it did not answer within 5 seconds"));
        probes += 1;
    }
    assert!((40..=90).contains(&probes), "{probes} probes");
    assert_eq!(scene.probe(introduced()), Heard::Answers(None));
    assert_eq!((scene.health(), scene.reason()), (Health::Healthy, String::new()));
}

#[test]
fn one_that_never_answers_is_unhealthy_soon_after_its_start_period() {
    let mut scene = Scene::new(HealthCheck::default());
    let begun = scene.clock.0.instant;
    let News::Unhealthy(reason) = scene.hang() else { panic!() };
    assert_eq!(reason, "it failed 3 probes in a row, the last because it did not answer within 5 seconds");
    let took = scene.clock.0.instant.saturating_duration_since(begun).as_secs();
    assert!((90..100).contains(&took), "after {took} s");
    assert_eq!(scene.health(), Health::Unhealthy);
}

#[test]
fn a_healthy_one_is_asked_at_its_interval_and_has_to_fail_several_times_in_a_row() {
    let mut scene = Scene::new(quick());
    scene.probe(introduced());
    for _ in 0..10 {
        let before = scene.clock.0.instant;
        assert_eq!(scene.probe(silence()), Heard::Fails(None));
        let pause = scene.clock.0.instant.saturating_duration_since(before).as_secs();
        assert!((27..=31).contains(&pause), "{pause} s");
        assert_eq!(scene.probe(silence()), Heard::Fails(None));
        assert_eq!(scene.health(), Health::Healthy);
        assert_eq!(scene.probe(introduced()), Heard::Answers(None));
    }
    assert!(matches!(scene.hang(), News::Unhealthy(_)));
    // It may recover by itself.
    assert_eq!(scene.probe(introduced()), Heard::Answers(Some(News::Healthy)));
    assert_eq!((scene.health(), scene.supervisor.next().1), (Health::Healthy, None));
}

#[test]
fn its_thresholds_are_kept_to() {
    let mut scene = Scene::new(HealthCheck { failure_threshold: 1, success_threshold: 3, ..quick() });
    scene.clock.pass(2);
    for _ in 0..2 {
        scene.probe(introduced());
        assert_eq!(scene.health(), Health::Unknown);
    }
    scene.probe(introduced());
    assert_eq!(scene.health(), Health::Healthy);
    let Heard::Fails(Some(News::Unhealthy(reason))) = scene.probe(silence()) else { panic!() };
    assert_eq!(reason, "it failed its probe: it did not answer within 5 seconds");
    for expected in [None, None, Some(News::Healthy)] {
        assert_eq!(scene.probe(introduced()), Heard::Answers(expected));
    }
}

#[test]
fn what_hangs_is_restarted_with_growing_pauses_until_the_agent_gives_up() {
    let mut scene = Scene::new(quick());
    for (number, pause) in [5, 10, 20, 40, 60].into_iter().enumerate() {
        assert!(matches!(scene.hang(), News::Unhealthy(_)));
        assert_eq!(scene.until_restart(), Duration::from_secs(pause));
        let told = scene.restart();
        assert!(told.contains(&format!("for the {} of at most 5 times", number + 1)), "{told}");
        // Answering for a while doesn't make it another server.
        scene.clock.pass(2);
        assert_eq!(scene.probe(introduced()), Heard::Answers(Some(News::Healthy)));
    }
    let News::GaveUp(reason) = scene.hang() else { panic!() };
    assert!(reason.contains("5 restarts in a row did not help") && reason.contains("/tools/one/restart"), "{reason}");
    assert_eq!((scene.health(), scene.supervisor.restarts()), (Health::Unhealthy, 5));
    for _ in 0..100 {
        scene.probe(silence());
        assert!(!scene.supervisor.is_to_be_restarted(scene.clock.0.instant));
    }
    assert!(scene.reason().contains("given up"), "{}", scene.reason());
    // It is asked on, and somebody who asks for it gets it all its chances again.
    assert_eq!(scene.probe(introduced()), Heard::Answers(Some(News::Healthy)));
    scene.supervisor.forgive();
    assert!(matches!(scene.hang(), News::Unhealthy(_)));
    assert_eq!(scene.until_restart(), Duration::from_secs(5));
}

#[test]
fn ten_minutes_of_health_make_up_for_its_restarts() {
    for (minutes, pause) in [(9, 20), (11, 5)] {
        let mut scene = Scene::new(quick());
        for _ in 0..2 {
            scene.hang();
            scene.until_restart();
            scene.restart();
        }
        scene.clock.pass(1);
        scene.probe(introduced());
        let well = scene.clock.0.instant;
        while scene.clock.0.instant.saturating_duration_since(well) < Duration::from_secs(minutes * 60 - 100) {
            scene.probe(introduced());
        }
        scene.hang();
        assert_eq!(scene.until_restart(), Duration::from_secs(pause), "{minutes} minutes");
    }
}

#[test]
fn one_that_hangs_in_its_start_period_is_not_restarted_before_that_has_passed() {
    let mut scene = Scene::new(HealthCheck { interval_seconds: 1, failure_threshold: 1, ..HealthCheck::default() });
    let begun = scene.clock.0.instant;
    scene.probe(introduced());
    assert!(matches!(scene.hang(), News::Unhealthy(_)));
    scene.until_restart();
    assert_eq!(scene.clock.0.instant.saturating_duration_since(begun), Duration::from_secs(90));
}

#[test]
fn one_that_is_not_to_be_restarted_is_only_reported() {
    let mut scene = Scene::new(HealthCheck { restart: false, ..quick() });
    let News::Unhealthy(reason) = scene.hang() else { panic!() };
    assert!(reason.contains("it is not restarted, as its healthCheck says"), "{reason}");
    assert_eq!(scene.supervisor.next().1, None);
}

#[test]
fn an_answer_about_a_process_that_is_gone_says_nothing() {
    let mut scene = Scene::new(quick());
    scene.clock.pass(2);
    let due = scene.supervisor.due(scene.clock.0.instant).unwrap();
    scene.started_anew();
    assert_eq!(scene.answer(due.round, silence()), Heard::TooLate);
    assert_eq!(scene.health(), Health::Starting);
    scene.supervisor.observe(None, &scene.check, &scene.timing, scene.clock.0);
    assert_eq!(scene.answer(due.round, introduced()), Heard::TooLate);
    assert_eq!((scene.health(), scene.supervisor.next()), (Health::Unknown, (None, None)));
}

#[test]
fn one_that_is_busy_with_a_call_is_not_restarted_under_it_unless_that_lasts_too_long() {
    for ends in [false, true] {
        let mut scene = Scene::new(quick());
        scene.clock.pass(2);
        scene.probe(introduced());
        // Between two probes, as nearly all of them.
        scene.clock.pass(10);
        let begun = scene.clock.0.instant;
        scene.calls = vec![begun];
        assert!(matches!(scene.hang(), News::Unhealthy(reason) if reason.contains("not restarted yet")));
        assert_eq!(scene.health(), Health::Unhealthy);
        scene.probe(silence());
        assert!(scene.reason().contains("not restarted yet"));
        if ends {
            // It has its answer, and the server is silent all the same.
            scene.calls.clear();
            scene.probe(silence());
            assert!(scene.supervisor.is_to_be_restarted(scene.clock.0.instant));
        } else {
            // It may have come free just then, so it is asked once more first.
            while scene.clock.0.instant < begun + Duration::from_secs(300) {
                assert_eq!(scene.supervisor.next().1, None);
                scene.probe(silence());
            }
            assert!(scene.clock.0.instant <= begun + Duration::from_secs(302), "at that time, not at the next");
            assert!(scene.supervisor.is_to_be_restarted(scene.clock.0.instant));
        }
    }
    // It was only slow.
    let mut scene = Scene::new(quick());
    scene.clock.pass(2);
    scene.probe(introduced());
    scene.calls = vec![scene.clock.0.instant];
    scene.hang();
    for _ in 0..5 {
        scene.probe(silence());
        assert!(!scene.supervisor.is_to_be_restarted(scene.clock.0.instant));
    }
    scene.calls.clear();
    assert_eq!(scene.probe(introduced()), Heard::Answers(Some(News::Healthy)));
    assert_eq!(scene.supervisor.restarts(), 0);
}

#[test]
fn one_that_comes_free_when_its_excuse_ends_is_not_restarted() {
    for answers_before in [false, true] {
        let mut scene = Scene::new(quick());
        scene.clock.pass(2);
        scene.probe(introduced());
        let begun = scene.clock.0.instant;
        scene.calls = vec![begun];
        scene.hang();
        while scene.supervisor.next().0.unwrap() < begun + BUSY - Duration::from_secs(1) {
            scene.probe(silence());
        }
        // A probe that began before says nothing of what came after.
        let before = begun + BUSY - Duration::from_secs(3);
        scene.supervisor.watched.as_mut().unwrap().probe = Probe::At(before);
        scene.clock.0.instant = before;
        let due = scene.supervisor.due(before).unwrap();
        scene.clock.pass(5);
        scene.answer(due.round, silence());
        let now = scene.clock.0.instant;
        assert!(!scene.supervisor.is_to_be_restarted(now));
        assert_eq!(scene.supervisor.next(), (Some(now), None), "it is asked at once");
        let due = scene.supervisor.due(now).unwrap();
        scene.answer(due.round, if answers_before { introduced() } else { silence() });
        assert_eq!(scene.supervisor.is_to_be_restarted(now), !answers_before);
        assert_eq!(scene.health(), if answers_before { Health::Healthy } else { Health::Unhealthy });
    }
}

#[test]
fn calls_that_came_after_it_fell_silent_are_no_excuse() {
    let mut scene = Scene::new(quick());
    scene.clock.pass(2);
    scene.probe(introduced());
    // Somebody calls again and again.
    scene.calls = vec![scene.clock.0.instant + Duration::from_secs(31)];
    scene.hang();
    assert_eq!(scene.until_restart(), Duration::from_secs(5));
}

#[test]
fn what_was_only_looked_away_from_goes_on_as_it_was() {
    let mut scene = Scene::new(HealthCheck::default());
    scene.probe(introduced());
    scene.clock.pass(60);
    let due = scene.supervisor.due(scene.clock.0.instant).unwrap();
    scene.supervisor.look_away();
    assert_eq!((scene.health(), scene.supervisor.next()), (Health::Unknown, (None, None)));
    assert_eq!(scene.answer(due.round, silence()), Heard::TooLate);
    scene.observe();
    assert_eq!(scene.health(), Health::Healthy);
    // What hung before an update that came to nothing hangs on.
    scene.hang();
    scene.supervisor.look_away();
    scene.clock.pass(60);
    assert!(!scene.supervisor.is_to_be_restarted(scene.clock.0.instant));
    scene.observe();
    assert_eq!(scene.health(), Health::Unhealthy);
    assert!(scene.supervisor.is_to_be_restarted(scene.clock.0.instant));
}

#[test]
fn one_that_can_not_be_asked_is_never_unhealthy() {
    let mut scene = Scene::new(HealthCheck { success_threshold: 3, ..quick() });
    for _ in 0..20 {
        assert_eq!(scene.probe(Ok(Answer::CannotSay)), Heard::Answers(None));
        assert_eq!((scene.health(), scene.reason()), (Health::Unknown, String::new()));
    }
    assert_eq!(scene.supervisor.last_probe_at(), None, "it was not probed");
}

#[test]
fn what_ran_before_the_agent_did_is_asked_within_a_second_and_not_judged_in_a_hurry() {
    let mut scene = Scene::new(HealthCheck::default());
    scene.process = Some(process("b", scene.clock.0.time - jiff::SignedDuration::from_hours(1)));
    scene.observe();
    let (at, _) = scene.supervisor.next();
    assert!(at.unwrap() <= scene.clock.0.instant + Duration::from_secs(1));
    assert_eq!(scene.health(), Health::Unknown);
    let begun = scene.clock.0.instant;
    scene.hang();
    let took = scene.clock.0.instant.saturating_duration_since(begun).as_secs();
    assert!((54..70).contains(&took), "{took} s");
}

#[test]
fn whoever_waited_for_its_start_is_believed() {
    let mut scene = Scene::new(HealthCheck::default());
    let process = scene.process.clone().unwrap();
    scene.supervisor.prove(process, &scene.check, &introduced().unwrap(), scene.clock.0);
    scene.observe();
    assert_eq!(scene.health(), Health::Healthy);
    scene.supervisor.condemn("it did not answer".to_owned());
    scene.started_anew();
    assert_eq!(scene.health(), Health::Starting, "it ended meanwhile, and that was another process");
    scene.supervisor.condemn("it did not answer".to_owned());
    scene.observe();
    assert_eq!((scene.health(), scene.reason().as_str()), (Health::Unhealthy, "it did not answer"));
    assert!(scene.supervisor.next().1.is_some());
}

#[test]
fn its_tools_are_asked_for_once_in_a_while_and_kept_meanwhile() {
    let mut scene = Scene::new(quick());
    let mut asked = 0;
    for _ in 0..21 {
        let (at, _) = scene.supervisor.next();
        scene.clock.pass(at.unwrap().saturating_duration_since(scene.clock.0.instant).as_secs() + 1);
        let due = scene.supervisor.due(scene.clock.0.instant).unwrap();
        asked += u32::from(due.question.tools);
        let answer = Answer::Introduced(Box::new(introduction(due.question.tools)));
        scene.answer(due.round, Ok(answer));
        let known = scene.supervisor.introduction().unwrap();
        assert_eq!(known.tools.as_deref(), Some(["add".to_owned()].as_slice()));
    }
    // In ten minutes.
    assert_eq!(asked, 2);
    // Another container may be another server.
    scene.process = Some(process("b", scene.clock.0.time));
    scene.observe();
    assert_eq!(scene.supervisor.introduction(), None);
}

#[test]
fn one_that_does_not_name_its_tools_is_not_asked_for_them_at_every_probe() {
    let mut scene = Scene::new(HealthCheck { interval_seconds: 10, ..quick() });
    let mut asked = Vec::new();
    for _ in 0..12 {
        let (at, _) = scene.supervisor.next();
        scene.clock.pass(at.unwrap().saturating_duration_since(scene.clock.0.instant).as_secs() + 1);
        let due = scene.supervisor.due(scene.clock.0.instant).unwrap();
        asked.push(due.question.tools);
        scene.answer(due.round, introduced());
    }
    assert_eq!(asked.iter().filter(|tools| **tools).count(), 2, "{asked:?}");
    assert!(asked[0]);
}

#[derive(Debug, Clone)]
enum Act {
    Pass(u64),
    Answer(u8),
    Restart,
    Ends,
    Forgive,
}

fn any_act() -> impl Strategy<Value = Act> {
    prop_oneof![
        3 => (0..200_u64).prop_map(Act::Pass),
        6 => (0..6_u8).prop_map(Act::Answer),
        2 => Just(Act::Restart),
        1 => Just(Act::Ends),
        1 => Just(Act::Forgive),
    ]
}

proptest! {
    #[test]
    fn it_is_unhealthy_only_after_failures_in_a_row_and_restarted_only_when_unhealthy(
        acts in prop::collection::vec(any_act(), 0..80),
        (failures, interval, start) in (1..5_u32, 1..60_u32, 1..120_u32),
    ) {
        let check = HealthCheck {
            failure_threshold: failures, interval_seconds: interval, start_period_seconds: start, ..HealthCheck::default()
        };
        let mut scene = Scene::new(check);
        let (mut in_a_row, mut restarts) = (0, 0);
        for act in acts {
            let now = scene.clock.0;
            match act {
                Act::Pass(seconds) => scene.clock.pass(seconds),
                Act::Answer(which) => {
                    let Some(due) = scene.supervisor.due(now.instant) else { continue };
                    let answer = match which {
                        0 => introduced(),
                        1 => Ok(Answer::CannotSay),
                        _ => silence(),
                    };
                    in_a_row = if answer.is_ok() { 0 } else { in_a_row + 1 };
                    scene.answer(due.round, answer);
                }
                Act::Restart if scene.supervisor.is_to_be_restarted(now.instant) => {
                    prop_assert_eq!(scene.health(), Health::Unhealthy);
                    let age = now.time.duration_since(scene.process.as_ref().unwrap().since).as_secs();
                    prop_assert!(age >= start.into(), "restarted when {} s old", age);
                    restarts += 1;
                    prop_assert!(restarts <= 5);
                    scene.restart();
                    in_a_row = 0;
                }
                Act::Restart => {}
                Act::Ends => {
                    scene.started_anew();
                    in_a_row = 0;
                }
                Act::Forgive => {
                    scene.supervisor.forgive();
                    restarts = 0;
                }
            }
            let unhealthy = scene.health() == Health::Unhealthy;
            prop_assert!(!unhealthy || in_a_row >= failures, "after {} failures", in_a_row);
            prop_assert_eq!(unhealthy, unhealthy && !scene.reason().is_empty());
            // There is always something to come.
            let (probe, restart) = scene.supervisor.next();
            prop_assert!(probe.is_some() && (restart.is_none() || unhealthy));
        }
    }
}
