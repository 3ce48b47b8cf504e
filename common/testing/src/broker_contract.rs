//! What every [`Broker`] promises, as tests: each implementation runs all of them.

use std::time::Duration;

use futures::stream::{self, BoxStream};
use futures::{FutureExt, StreamExt};
use time::OffsetDateTime;
use tokio_util::sync::CancellationToken;

use common::broker::{
    Broker, DELIVERY_LIMIT, DeadJob, DeathCause, Delivery, Enqueued, Entries, Event, HostPause,
    InHand, LedgerEntry, Notice, Position, RollCall, Settlement, SharedBroker, Waiting,
    WorkerState,
};
use common::fault::FaultKind;
use common::ids::PushedAt;
use common::ids::RepoRef;
use common::ids::RunId;
use common::job::{Job, WIRE_VERSION};
use common::outcome::{Outcome, OutcomeRecord};

/// How long something may take that a broker has promised to do.
const PROMPTLY: Duration = Duration::from_secs(30);

/// Runs every test, each on a broker of its own that `fresh` makes.
pub async fn check<F>(fresh: impl Fn() -> F)
where
    F: Future<Output = SharedBroker>,
{
    jobs_are_delivered_once_and_settled_for_good(fresh().await).await;
    a_dropped_delivery_comes_back(fresh().await).await;
    prefetch_bounds_what_is_unsettled(fresh().await).await;
    again_keeps_its_counts_and_its_pause(fresh().await).await;
    deliveries_end_when_no_more_are_wanted(fresh().await).await;
    the_ledger_has_jobs_before_outcomes(fresh().await).await;
    followers_see_what_comes_after(fresh().await).await;
    a_job_never_settled_is_given_up(fresh().await).await;
    one_producer_at_a_time(fresh().await).await;
    a_dead_letter_stays_until_it_is_removed(fresh().await).await;
    what_waits_is_counted(fresh().await).await;
    what_waits_can_be_taken_and_put_back(fresh().await).await;
    an_announcement_reaches_everybody_who_listens(fresh().await).await;
    a_roll_call_is_answered(fresh().await).await;
    why_workers_wait_is_recorded(fresh().await).await;
    a_replay_from_the_future_ends(fresh().await).await;
    limits_are_told(fresh().await).await;
    a_closed_broker_ends_its_streams(fresh().await).await;
}

/// The job number `n` of `run`.
pub fn job(run: &RunId, n: usize) -> Job {
    Job {
        version: WIRE_VERSION,
        run: run.clone(),
        repo: RepoRef::new("owner", &format!("name-{n}")).expect("a plain name"),
        url: format!("https://github.com/owner/name-{n}"),
        pushed_at: PushedAt::new("2026-01-01T00:00:00Z").expect("a plain time"),
        force: false,
        replay_of: None,
        // It stays with the job wherever that goes.
        traceparent: Some(format!("00-{n:032x}-00f067aa0ba902b7-01")),
    }
}

/// An outcome for `job`.
pub fn outcome(job: &Job, outcome: Outcome) -> Event {
    Event::Outcome(OutcomeRecord {
        run: job.run.clone(),
        repo: job.repo.clone(),
        pushed_at: job.pushed_at.clone(),
        outcome,
        message: String::new(),
        attempt: 0,
        millis: 1,
        fetched_bytes: 2,
        stored_bytes: 3,
        digest: None,
        renamed_to: None,
        worker: "worker-1".to_owned(),
    })
}

/// A pause of `github.com`.
pub fn host_pause(until_millis: i64) -> Notice {
    Notice::HostPause(HostPause {
        host: "github.com".to_owned(),
        until_millis,
        worker: "worker-1".to_owned(),
    })
}

async fn enqueue(broker: &dyn Broker, jobs: usize) -> Vec<Job> {
    let run = RunId::new();
    let jobs: Vec<_> = (0..jobs).map(|n| job(&run, n)).collect();
    let enqueued = broker.enqueue(stream::iter(jobs.clone()).boxed()).await;
    let expected = Enqueued {
        jobs: jobs.len() as u64,
    };
    assert_eq!(enqueued.expect("enqueue"), expected);
    jobs
}

async fn deliveries(broker: &dyn Broker, prefetch: u16) -> BoxStream<'static, Delivery> {
    broker.deliveries(prefetch).await.expect("deliveries")
}

async fn next<T>(stream: &mut BoxStream<'static, T>, what: &str) -> T {
    tokio::time::timeout(PROMPTLY, stream.next())
        .await
        .unwrap_or_else(|_| panic!("no {what} within {PROMPTLY:?}"))
        .unwrap_or_else(|| panic!("the stream ended before a {what}"))
}

async fn settle(delivery: Delivery, settlement: Settlement) {
    delivery.settle(settlement).await.expect("settle");
}

async fn jobs_are_delivered_once_and_settled_for_good(broker: SharedBroker) {
    let jobs = enqueue(&*broker, 50).await;
    let (mut one, mut two) = (deliveries(&*broker, 5).await, deliveries(&*broker, 5).await);
    let mut seen = Vec::new();
    while seen.len() < jobs.len() {
        let delivery = tokio::select! {
            delivery = next(&mut one, "delivery") => delivery,
            delivery = next(&mut two, "delivery") => delivery,
        };
        assert_eq!((delivery.attempt, delivery.waits), (0, 0));
        seen.push(delivery.job.clone());
        settle(delivery, Settlement::Done).await;
    }
    let name = |job: &Job| job.repo.name().to_owned();
    let (mut seen, mut jobs) = (seen.clone(), jobs);
    seen.sort_by_key(name);
    jobs.sort_by_key(name);
    assert_eq!(seen, jobs);

    // What was settled stays settled when its consumers go.
    drop((one, two));
    let marker = enqueue(&*broker, 1).await.remove(0);
    let mut three = deliveries(&*broker, 5).await;
    let delivery = next(&mut three, "delivery").await;
    assert_eq!(delivery.job, marker);
    settle(delivery, Settlement::Done).await;
}

async fn a_dropped_delivery_comes_back(broker: SharedBroker) {
    let jobs = enqueue(&*broker, 1).await;
    let mut stream = deliveries(&*broker, 1).await;
    for returns in 0..3 {
        let delivery = next(&mut stream, "delivery").await;
        assert_eq!((&delivery.job, delivery.attempt), (&jobs[0], 0));
        assert_eq!(delivery.returns, returns);
    }
    let last = next(&mut stream, "last delivery").await;
    settle(last, Settlement::Done).await;
}

async fn prefetch_bounds_what_is_unsettled(broker: SharedBroker) {
    enqueue(&*broker, 3).await;
    let mut stream = deliveries(&*broker, 2).await;
    let one = next(&mut stream, "delivery").await;
    let two = next(&mut stream, "delivery").await;
    // The third goes to another consumer, for which this one leaves it.
    let mut other = deliveries(&*broker, 1).await;
    let three = next(&mut other, "delivery to the other").await;
    assert!(
        stream.next().now_or_never().is_none(),
        "more than the prefetch"
    );
    for delivery in [one, two, three] {
        settle(delivery, Settlement::Done).await;
    }
}

async fn again_keeps_its_counts_and_its_pause(broker: SharedBroker) {
    enqueue(&*broker, 1).await;
    let mut stream = deliveries(&*broker, 1).await;
    let first = next(&mut stream, "delivery").await;
    let start = std::time::Instant::now();
    let after = Duration::from_secs(1);
    let settlement = Settlement::Again {
        after,
        attempt: 2,
        waits: 7,
        returns: 3,
    };
    settle(first, settlement).await;
    let second = next(&mut stream, "delivery after the pause").await;
    assert!(start.elapsed() >= after, "after {:?}", start.elapsed());
    assert_eq!((second.attempt, second.waits, second.returns), (2, 7, 3));
    drop(second);
    let third = next(&mut stream, "delivery after a return").await;
    assert_eq!((third.attempt, third.waits, third.returns), (2, 7, 4));
    settle(third, Settlement::Dead).await;
}

async fn deliveries_end_when_no_more_are_wanted(broker: SharedBroker) {
    enqueue(&*broker, 3).await;
    let until = CancellationToken::new();
    let stream = broker.deliveries_until(2, until.clone()).await;
    let mut stream = stream.expect("deliveries");
    let first = next(&mut stream, "delivery").await;
    until.cancel();
    let rest = tokio::time::timeout(PROMPTLY, stream.collect::<Vec<_>>()).await;
    // At most what was on its way already.
    let rest = rest.expect("the stream ends promptly");
    assert!(rest.len() <= 1, "{rest:?}");
    for delivery in rest.into_iter().chain([first]) {
        settle(delivery, Settlement::Done).await;
    }
    waiting(&*broker, |waiting| waiting.workers == 0).await;
}

async fn the_ledger_has_jobs_before_outcomes(broker: SharedBroker) {
    let jobs = enqueue(&*broker, 2).await;
    let ended = [
        outcome(&jobs[0], Outcome::Processed),
        outcome(&jobs[1], Outcome::Failed(FaultKind::Gone)),
    ];
    for event in &ended {
        broker.record(event).await.expect("record");
    }
    let expected: Vec<_> = jobs.into_iter().map(Event::Job).chain(ended).collect();
    let mut events = broker.events(Position::Start).await.expect("events");
    let earliest = OffsetDateTime::now_utc() - PROMPTLY;
    for event in &expected {
        let entry = next(&mut events, "entry").await.expect("no fault");
        assert_eq!(&entry.event, event);
        assert!(entry.at > earliest, "{}", entry.at);
    }
    for from in [Position::Start, Position::Since(earliest)] {
        let history = history(&*broker, from).await;
        assert_eq!(history, expected, "{from:?}");
    }
    assert_eq!(history(&*broker, Position::Now).await, []);
}

async fn followers_see_what_comes_after(broker: SharedBroker) {
    let before = enqueue(&*broker, 1).await.remove(0);
    let mut events = broker.events(Position::Now).await.expect("events");
    let after = outcome(&before, Outcome::Unchanged);
    broker.record(&after).await.expect("record");
    assert_eq!(event(&mut events).await, after);
}

async fn a_job_never_settled_is_given_up(broker: SharedBroker) {
    let mut events = broker.events(Position::Now).await.expect("events");
    let job = enqueue(&*broker, 1).await.remove(0);
    let mut stream = deliveries(&*broker, 1).await;
    for _ in 0..=DELIVERY_LIMIT {
        drop(next(&mut stream, "delivery").await);
    }
    assert_eq!(event(&mut events).await, Event::Job(job.clone()));
    let cause = DeathCause::DeliveryLimit;
    let dead = Event::Dead(DeadJob { job, cause });
    assert_eq!(event(&mut events).await, dead);
    let record = dead.into_outcome().expect("a failure");
    assert_eq!(record.outcome, Outcome::Failed(FaultKind::Killed));
}

async fn a_dead_letter_stays_until_it_is_removed(broker: SharedBroker) {
    let jobs = enqueue(&*broker, 3).await;
    let mut events = broker.events(Position::Now).await.expect("events");
    let mut stream = deliveries(&*broker, 1).await;
    for _ in &jobs {
        let delivery = next(&mut stream, "delivery").await;
        settle(delivery, Settlement::Dead).await;
    }
    waiting(&*broker, |waiting| waiting.dead == 3).await;
    for job in &jobs {
        let cause = DeathCause::Rejected;
        let job = job.clone();
        assert_eq!(
            event(&mut events).await,
            Event::Dead(DeadJob { job, cause })
        );
    }
    // Whoever needs one takes one.
    let mut letters = broker.dead_letters().await.expect("dead letters");
    let first = next(&mut letters, "letter").await.expect("a letter");
    assert_eq!(first.id, jobs[0].id());
    drop((first, letters));
    waiting(&*broker, |waiting| waiting.dead == 3).await;
    for left in [3, 2] {
        let letters = broker.dead_letters().await.expect("dead letters");
        let letters: Vec<_> = letters
            .map(|letter| letter.expect("a letter"))
            .collect()
            .await;
        assert_eq!(letters.len(), left);
        for letter in letters {
            let job = letter.job.clone().expect("a job");
            assert_eq!((letter.id.clone(), letter.attempt), (job.id(), 0));
            assert!(letter.at.is_some());
            assert_eq!(letter.payload, job.encode());
            if job == jobs[1] {
                letter.remove().await.expect("remove");
            }
        }
        waiting(&*broker, |waiting| waiting.dead == 2).await;
    }
}

async fn what_waits_is_counted(broker: SharedBroker) {
    assert_eq!(broker.waiting().await.expect("waiting"), Waiting::default());
    enqueue(&*broker, 4).await;
    waiting(&*broker, |waiting| waiting.ready == 4).await;
    let mut stream = deliveries(&*broker, 2).await;
    let one = next(&mut stream, "delivery").await;
    waiting(&*broker, |waiting| waiting.workers == 1).await;
    let again = Settlement::Again {
        after: Duration::from_secs(60),
        attempt: 1,
        waits: 0,
        returns: 0,
    };
    settle(one, again).await;
    let two = next(&mut stream, "delivery").await;
    settle(two, Settlement::Dead).await;
    waiting(&*broker, |waiting| (waiting.retry, waiting.dead) == (1, 1)).await;
    drop(stream);
    waiting(&*broker, |waiting| waiting.workers == 0).await;
}

async fn what_waits_can_be_taken_and_put_back(broker: SharedBroker) {
    let jobs = enqueue(&*broker, 5).await;
    let mut stream = deliveries(&*broker, 5).await;
    let again = |after| Settlement::Again {
        after,
        attempt: 2,
        waits: 7,
        returns: 3,
    };
    let mut taken = Vec::new();
    for _ in &jobs {
        taken.push(next(&mut stream, "delivery").await);
    }
    drop(stream);
    for delivery in taken {
        let settlement = match delivery.job.repo.name() {
            "name-0" => again(Duration::from_secs(60)),
            "name-1" => again(Duration::ZERO),
            _ => Settlement::Back,
        };
        settle(delivery, settlement).await;
    }
    let all = |waiting: Waiting| waiting.workers == 0 && (waiting.ready, waiting.retry) == (4, 1);
    waiting(&*broker, all).await;
    let ledger = history(&*broker, Position::Start).await;

    // However often it is looked at, nothing is charged.
    for _ in 0..=DELIVERY_LIMIT {
        let seen = take_waiting(&*broker, Settlement::Back).await;
        assert!(jobs.iter().all(|job| seen.contains(job)), "{seen:?}");
        waiting(&*broker, all).await;
    }
    assert_eq!(history(&*broker, Position::Start).await, ledger);
    let until = CancellationToken::new();
    until.cancel();
    let none = broker.take_waiting(until).await.expect("jobs");
    assert_eq!(none.count().await, 0);

    let mut taken = take_waiting(&*broker, Settlement::Done).await;
    taken.sort_by_key(|job| job.repo.name().to_owned());
    assert_eq!(taken, jobs);
    let nothing = |waiting: Waiting| (waiting.ready, waiting.retry) == (0, 0);
    waiting(&*broker, nothing).await;
    assert_eq!(take_waiting(&*broker, Settlement::Done).await, []);
}

/// Settles all that waits in this way; the first two jobs have counts, all others none.
async fn take_waiting(broker: &dyn Broker, settlement: Settlement) -> Vec<Job> {
    let until = CancellationToken::new();
    let mut stream = broker.take_waiting(until).await.expect("jobs");
    let taking = async {
        let mut taken = Vec::new();
        while let Some(delivery) = stream.next().await {
            let delivery = delivery.expect("a job");
            let counts = (delivery.attempt, delivery.waits, delivery.returns);
            let has_counts = ["name-0", "name-1"].contains(&delivery.job.repo.name());
            let expected = if has_counts { (2, 7, 3) } else { (0, 0, 0) };
            assert_eq!(counts, expected, "{:?}", delivery.job);
            taken.push(delivery.job.clone());
            settle(delivery, settlement.clone()).await;
        }
        taken
    };
    let taken = tokio::time::timeout(PROMPTLY, taking).await;
    taken.expect("the stream ends promptly")
}

async fn an_announcement_reaches_everybody_who_listens(broker: SharedBroker) {
    // Nobody listens: that is no error.
    broker.announce(&host_pause(1)).await.expect("announce");
    let mut first = broker.announcements().await.expect("announcements");
    let mut second = broker.announcements().await.expect("announcements");
    for until in [2, 3] {
        broker.announce(&host_pause(until)).await.expect("announce");
        assert_eq!(next(&mut first, "announcement").await, host_pause(until));
        assert_eq!(next(&mut second, "announcement").await, host_pause(until));
    }
}

async fn a_roll_call_is_answered(broker: SharedBroker) {
    let mut producer = broker.announcements().await.expect("announcements");
    let mut worker = broker.announcements().await.expect("announcements");
    let question = Notice::RollCall(RollCall {
        roll_call: "one".to_owned(),
    });
    broker.announce(&question).await.expect("announce");
    assert_eq!(next(&mut worker, "roll call").await, question);
    // As much as a large worker has in hand.
    let run = RunId::new();
    let answer = Notice::InHand(InHand {
        answers: "one".to_owned(),
        worker: "worker-1".to_owned(),
        jobs: (0..1000).map(|n| job(&run, n).id()).collect(),
        since_millis: (0..1000).collect(),
        tokens: Some(vec!["github.com".to_owned()]),
    });
    broker.announce(&answer).await.expect("announce");
    assert_eq!(next(&mut producer, "its own question").await, question);
    assert_eq!(next(&mut producer, "answer").await, answer);
}

async fn why_workers_wait_is_recorded(broker: SharedBroker) {
    let mut events = broker.events(Position::Now).await.expect("events");
    let waiting = Event::Worker(WorkerState {
        worker: "worker-1".to_owned(),
        infra: Some("access denied to bucket x".to_owned()),
        hosts: [("github.com".to_owned(), 1)].into(),
    });
    let working = Event::Worker(WorkerState {
        worker: "worker-1".to_owned(),
        ..WorkerState::default()
    });
    for state in [waiting, working] {
        broker.record(&state).await.expect("record");
        assert_eq!(event(&mut events).await, state);
    }
    assert_eq!(history(&*broker, Position::Start).await.len(), 2);
}

/// As of a run that began by a clock far ahead of the broker's.
async fn a_replay_from_the_future_ends(broker: SharedBroker) {
    let job = Event::Job(enqueue(&*broker, 1).await.remove(0));
    let tomorrow = OffsetDateTime::now_utc() + Duration::from_secs(24 * 3600);
    let replayed = history(&*broker, Position::Since(tomorrow)).await;
    assert!(replayed.iter().all(|event| *event == job), "{replayed:?}");
}

async fn limits_are_told(broker: SharedBroker) {
    if let Some(limit) = broker.loan_limit() {
        assert!(limit > PROMPTLY, "{limit:?}");
    }
}

async fn a_closed_broker_ends_its_streams(broker: SharedBroker) {
    broker.probe().await.expect("probe");
    let mut deliveries = deliveries(&*broker, 1).await;
    let mut events = broker.events(Position::Now).await.expect("events");
    broker.close().await;
    let ended = async {
        (
            deliveries.next().await.is_none(),
            events.next().await.is_none(),
        )
    };
    let ended = tokio::time::timeout(PROMPTLY, ended).await;
    assert_eq!(ended.expect("the streams end"), (true, true));
    let fault = broker.probe().await.expect_err("closed");
    assert_eq!(fault.kind, FaultKind::Infra);
}

/// Waits for counts that come true promptly, but not at once.
async fn waiting(broker: &dyn Broker, expected: impl Fn(Waiting) -> bool) {
    let start = std::time::Instant::now();
    loop {
        let waiting = broker.waiting().await.expect("waiting");
        let backlog = broker.backlog().await.expect("backlog");
        let same = (backlog.ready, backlog.workers) == (waiting.ready, waiting.workers);
        if same && expected(waiting) {
            return;
        }
        assert!(start.elapsed() < PROMPTLY, "{waiting:?} {backlog:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn event(events: &mut Entries) -> Event {
    next(events, "event").await.expect("no fault").event
}

async fn history(broker: &dyn Broker, from: Position) -> Vec<Event> {
    let history = broker.history(from).await.expect("history");
    let entries = history.map(|entry: Result<LedgerEntry, _>| entry.expect("no fault").event);
    tokio::time::timeout(PROMPTLY, entries.collect())
        .await
        .expect("the history ends")
}

async fn one_producer_at_a_time(broker: SharedBroker) {
    let lock = broker.producer_lock().await.expect("lock");
    assert!(lock.is_some());
    assert!(broker.producer_lock().await.expect("lock").is_none());
    drop(lock);
    let freed = async {
        loop {
            if broker.producer_lock().await.expect("lock").is_some() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PROMPTLY, freed)
        .await
        .expect("the lock is given back");
}
