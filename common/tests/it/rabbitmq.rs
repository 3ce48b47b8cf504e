//! What the RabbitMQ broker does beyond the contract: when the broker, the connection, or a
//! message is not what it should be.

use std::collections::{HashMap, HashSet};
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::broker::amqp::AmqpBroker;
use common::broker::amqp::options::Options;
use common::broker::config::BrokerConfig;
use common::broker::{
    Broker, DELIVERY_LIMIT, DeadJob, DeadLetter, DeathCause, Entries, Event, Position, Settlement,
    Waiting,
};
use common::exit;
use common::fault::FaultKind;
use common::ids::RunId;
use common::job::Job;
use common::outcome::Outcome;
use futures::StreamExt;
use futures::stream::{self, BoxStream};
use lapin::options::{
    BasicGetOptions, BasicPublishOptions, ConfirmSelectOptions, QueueDeleteOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Confirmation, Connection, ConnectionProperties};
use testing::broker_contract::{host_pause, job, outcome};
use testing::rabbitmq::frames::{CONSUMING, DELIVER, START};
use testing::rabbitmq::{Node, fresh_prefix, shared_url};
use testing::tcp_proxy::TcpProxy;
use time::OffsetDateTime;

/// How long something may take that is sure to come.
const PROMPTLY: Duration = Duration::from_secs(60);

async fn connect(url: &str, prefix: &str) -> AmqpBroker {
    AmqpBroker::connect(options(url, prefix)).await.unwrap()
}

fn options(url: &str, prefix: &str) -> Options {
    let mut options = Options::new(url, prefix).unwrap();
    options.patience = PROMPTLY;
    options
}

/// A proxy in front of the shared broker, and the broker's URL through it.
fn proxied() -> (TcpProxy, String) {
    proxy_of(&shared_url())
}

fn proxy_of(url: &str) -> (TcpProxy, String) {
    let (before, authority) = url.rsplit_once('@').unwrap();
    let (authority, after) = authority.split_once('/').unwrap_or((authority, ""));
    let (host, port) = authority.split_once(':').unwrap_or((authority, "5672"));
    let host: Ipv4Addr = host.parse().unwrap_or(Ipv4Addr::LOCALHOST);
    let proxy = TcpProxy::start(SocketAddr::from((host, port.parse().unwrap())));
    let url = format!("{before}@{}/{after}", proxy.address());
    (proxy, url)
}

/// A client that says what we would never say.
async fn raw(url: &str) -> (Connection, Channel) {
    let connection = Connection::connect(url, ConnectionProperties::default())
        .await
        .unwrap();
    let channel = connection.create_channel().await.unwrap();
    channel
        .confirm_select(ConfirmSelectOptions::default())
        .await
        .unwrap();
    (connection, channel)
}

async fn publish_raw(channel: &Channel, prefix: &str, body: &[u8], properties: BasicProperties) {
    let publish = channel.basic_publish(
        prefix.into(),
        "job".into(),
        BasicPublishOptions::default(),
        body,
        properties,
    );
    assert_eq!(
        publish.await.unwrap().await.unwrap(),
        Confirmation::Ack(None)
    );
}

fn jobs(run: &RunId, range: std::ops::Range<usize>) -> Vec<Job> {
    range.map(|n| job(run, n)).collect()
}

async fn enqueue(broker: &AmqpBroker, jobs: &[Job]) {
    let enqueued = broker
        .enqueue(stream::iter(jobs.to_vec()).boxed())
        .await
        .unwrap();
    assert_eq!(enqueued.jobs, jobs.len() as u64);
}

async fn next<T>(stream: &mut BoxStream<'static, T>) -> T {
    tokio::time::timeout(PROMPTLY, stream.next())
        .await
        .expect("promptly")
        .expect("not the end")
}

async fn event(events: &mut Entries) -> Event {
    next(events).await.unwrap().event
}

async fn waiting(broker: &AmqpBroker, expected: impl Fn(Waiting) -> bool) {
    let start = Instant::now();
    loop {
        let waiting = broker.waiting().await.unwrap();
        if expected(waiting) {
            return;
        }
        assert!(start.elapsed() < PROMPTLY, "{waiting:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn history(broker: &AmqpBroker) -> Vec<Event> {
    let history = broker.history(Position::Start).await.unwrap();
    history.map(|entry| entry.unwrap().event).collect().await
}

/// Publishes and consumes while `disturb` does what it does; nothing may be missing afterwards.
async fn nothing_is_lost(url: &str, prefix: &str, disturb: impl AsyncFnOnce()) {
    let (producer, worker) = (connect(url, prefix).await, connect(url, prefix).await);
    let run = RunId::new();
    let all = jobs(&run, 0..4000);
    let mut events = producer.events(Position::Now).await.unwrap();
    let stop = AtomicBool::new(false);

    let publishing = async {
        // In slices, so that the disturbance comes while there is still something to publish.
        for slice in all.chunks(100) {
            enqueue(&producer, slice).await;
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let working = async {
        let mut deliveries = worker.deliveries(10).await.unwrap();
        while !stop.load(Ordering::SeqCst) {
            let wait = Duration::from_millis(100);
            let Ok(delivery) = tokio::time::timeout(wait, deliveries.next()).await else {
                continue;
            };
            let delivery = delivery.unwrap();
            worker
                .record(&outcome(&delivery.job, Outcome::Processed))
                .await
                .unwrap();
            // Where it cannot be settled it comes again.
            _ = delivery.settle(Settlement::Done).await;
        }
    };
    // The follower's own end: each job has its outcome.
    let following = async {
        let mut outcomes: HashMap<_, usize> = HashMap::new();
        while outcomes.len() < all.len() {
            if let Event::Outcome(record) = event(&mut events).await
                && record.run == run
            {
                *outcomes.entry(record.key()).or_default() += 1;
            }
        }
        stop.store(true, Ordering::SeqCst);
        outcomes
    };
    let ((), (), outcomes, ()) = tokio::join!(publishing, working, following, disturb());

    let twice = outcomes.values().filter(|count| **count > 1).count();
    // What was in flight at each disturbance: ten on loan, and the unconfirmed ones.
    assert!(twice < 600, "{twice} of {} were done twice", all.len());
    waiting(&worker, |waiting| waiting == Waiting::default()).await;
    // The ledger tells it again from its start: a job before its outcome, all of both.
    let mut published = HashMap::new();
    for event in history(&producer).await {
        match event {
            Event::Job(job) if job.run != run => {}
            Event::Outcome(record) if record.run != run => {}
            Event::Job(job) => {
                published.insert(job.key(), false);
            }
            Event::Outcome(record) => {
                let known = published.get_mut(&record.key());
                *known.expect("no outcome comes before its job") = true;
            }
            Event::Dead(dead) => panic!("{} was given up", dead.job.id()),
            Event::Worker(state) => panic!("nobody waits: {state:?}"),
        }
    }
    assert_eq!(published.len(), all.len());
    assert!(published.values().all(|ended| *ended));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_lost_when_the_broker_is_killed_or_restarted() {
    let mut node = Node::start();
    let (url, prefix) = (node.url(), fresh_prefix());
    // A broker writes down a little later which queues it has. Killed in the first second of their
    // lives, 3.10 forgets some of them, and its streams for good: not what is tried here.
    connect(&url, &prefix).await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    nothing_is_lost(&url, &prefix, async || {
        tokio::time::sleep(Duration::from_millis(500)).await;
        node.kill();
        tokio::task::block_in_place(|| node.start_again());
    })
    .await;
    nothing_is_lost(&url, &prefix, async || {
        tokio::time::sleep(Duration::from_millis(500)).await;
        tokio::task::block_in_place(|| {
            node.shut_down();
            node.start_again();
        });
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_lost_when_connections_are_cut() {
    let (proxy, url) = proxied();
    nothing_is_lost(&url, &fresh_prefix(), async || {
        for _ in 0..4 {
            tokio::time::sleep(Duration::from_millis(300)).await;
            proxy.cut();
        }
        proxy.refuse();
        tokio::time::sleep(Duration::from_millis(500)).await;
        proxy.flow();
    })
    .await;
    assert!(proxy.connections() > 8);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_that_says_nothing_is_given_up() {
    let (proxy, url) = proxied();
    let mut options = options(&url, &fresh_prefix());
    options.call_limit = Duration::from_secs(2);
    let broker = AmqpBroker::connect(options).await.unwrap();
    let one = jobs(&RunId::new(), 0..1).remove(0);
    enqueue(&broker, std::slice::from_ref(&one)).await;
    let before = proxy.connections();
    proxy.stall();
    let dead = Event::Dead(one.into());
    let recorded = broker.record(&dead);
    let healed = async {
        // The limit ends the first attempt; what is tried after that gets through.
        tokio::time::sleep(Duration::from_secs(3)).await;
        proxy.flow();
    };
    let (recorded, ()) = tokio::join!(recorded, healed);
    recorded.unwrap();
    assert!(proxy.connections() > before);
    assert!(history(&broker).await.contains(&dead));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_alarm_is_waited_for_with_what_was_sent() {
    let node = Node::start();
    let (proxy, url) = proxy_of(&node.url());
    let mut options = options(&url, &fresh_prefix());
    options.call_limit = Duration::from_secs(1);
    let broker = AmqpBroker::connect(options.clone()).await.unwrap();
    options.patience = Duration::from_secs(2);
    let impatient = AmqpBroker::connect(options).await.unwrap();
    let all = jobs(&RunId::new(), 0..700);
    let one = &all[0];
    node.control(&["set_vm_memory_high_watermark", "0"]);
    let before = proxy.connections();

    let event = outcome(one, Outcome::Unchanged);
    let fault = impatient.record(&event).await.unwrap_err();
    assert!(fault.message.contains("alarm"), "{fault}");
    let event = outcome(one, Outcome::Processed);
    let recorded = broker.record(&event);
    let enqueued = broker.enqueue(stream::iter(all.clone()).boxed());
    let relieved = async {
        tokio::time::sleep(Duration::from_secs(4)).await;
        let control = ["set_vm_memory_high_watermark", "absolute", "1GB"];
        tokio::task::block_in_place(|| node.control(&control));
    };
    let (recorded, enqueued, ()) = tokio::join!(recorded, enqueued, relieved);
    recorded.unwrap();
    assert_eq!(enqueued.unwrap().jobs, 700);
    // What was given up was sent all the same, without harm to the connection.
    impatient.record(&event).await.unwrap();
    assert_eq!(proxy.connections(), before);
    let history = history(&impatient).await;
    // Each once; the outcomes are one given up and one recorded twice.
    assert_eq!(history.len(), 703);
    assert_eq!(history.iter().filter(|other| **other == event).count(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn following_goes_on_where_a_connection_left_off() {
    let (proxy, url) = proxied();
    let broker = connect(&url, &fresh_prefix()).await;
    // Attached, and nothing seen yet: what comes while it is away is not lost either.
    let mut events = broker.events(Position::Now).await.unwrap();
    let run = RunId::new();
    let all = jobs(&run, 0..1500);
    for slice in all.chunks(500) {
        proxy.cut();
        enqueue(&broker, slice).await;
        // What had no confirm when the connection was cut is published again: it may be there
        // twice, and later than what came after it.
        let mut missing: HashSet<_> = slice.iter().map(Job::id).collect();
        while !missing.is_empty() {
            match event(&mut events).await {
                Event::Job(job) => missing.remove(&job.id()),
                other => panic!("{other:?}"),
            };
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn following_begins_though_the_connection_goes_meanwhile() {
    let (proxy, url) = proxied();
    let mut options = options(&url, &fresh_prefix());
    options.call_limit = Duration::from_secs(2);
    options.patience = Duration::from_secs(20);
    let broker = AmqpBroker::connect(options).await.unwrap();
    // Attached, and what is written then does not arrive.
    proxy.stall_at(DELIVER);
    let disturbed = async {
        tokio::time::sleep(Duration::from_secs(1)).await;
        proxy.cut();
        proxy.flow();
    };
    let (events, ()) = tokio::join!(broker.events(Position::Now), disturbed);
    let mut events = events.unwrap();
    let one = jobs(&RunId::new(), 0..1).remove(0);
    enqueue(&broker, std::slice::from_ref(&one)).await;
    assert_eq!(event(&mut events).await, Event::Job(one));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ledger_that_is_slow_to_come_back_is_waited_for() {
    let (proxy, url) = proxied();
    let mut options = options(&url, &fresh_prefix());
    options.call_limit = Duration::from_secs(2);
    let broker = AmqpBroker::connect(options).await.unwrap();
    let all = jobs(&RunId::new(), 0..2);
    let mut events = broker.events(Position::Now).await.unwrap();
    enqueue(&broker, &all[..1]).await;
    assert_eq!(event(&mut events).await, Event::Job(all[0].clone()));
    proxy.stall_at(DELIVER);
    proxy.cut();
    let slow = async {
        tokio::time::sleep(Duration::from_secs(5)).await;
        proxy.flow();
        enqueue(&broker, &all[1..]).await;
    };
    let (seen, ()) = tokio::join!(event(&mut events), slow);
    assert_eq!(seen, Event::Job(all[1].clone()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ledger_that_is_deleted_ends_who_follows_it() {
    let (url, prefix) = (shared_url(), fresh_prefix());
    let broker = connect(&url, &prefix).await;
    let one = jobs(&RunId::new(), 0..1).remove(0);
    let mut events = broker.events(Position::Now).await.unwrap();
    enqueue(&broker, std::slice::from_ref(&one)).await;
    assert_eq!(event(&mut events).await, Event::Job(one.clone()));

    let (connection, channel) = raw(&url).await;
    let ledger = format!("{prefix}.ledger");
    channel
        .queue_delete(ledger.as_str().into(), QueueDeleteOptions::default())
        .await
        .unwrap();
    let fault = next(&mut events).await.unwrap_err();
    assert_eq!(fault.kind, FaultKind::Infra);
    assert!(fault.message.contains(&ledger), "{fault}");
    assert!(events.next().await.is_none());

    // It is declared again by whoever needs it next.
    broker
        .record(&outcome(&one, Outcome::Processed))
        .await
        .unwrap();
    assert_eq!(history(&broker).await, [outcome(&one, Outcome::Processed)]);
    connection.close(200, "".into()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ledger_that_was_emptied_meanwhile_is_noticed() {
    let (url, prefix) = (shared_url(), fresh_prefix());
    let (proxy, through) = proxied();
    let broker = connect(&through, &prefix).await;
    let run = RunId::new();
    let mut events = broker.events(Position::Start).await.unwrap();
    enqueue(&broker, &jobs(&run, 0..3)).await;
    for _ in 0..3 {
        event(&mut events).await;
    }
    proxy.refuse();
    let (connection, channel) = raw(&url).await;
    let ledger = format!("{prefix}.ledger");
    channel
        .queue_delete(ledger.as_str().into(), QueueDeleteOptions::default())
        .await
        .unwrap();
    // Another process makes it anew, and more is recorded than was there before.
    let other = connect(&url, &prefix).await;
    enqueue(&other, &jobs(&run, 10..20)).await;
    proxy.flow();
    let fault = next(&mut events).await.unwrap_err();
    assert!(fault.message.contains(&ledger), "{fault}");
    connection.close(200, "".into()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_no_job_is_recorded_and_dead_lettered() {
    let (url, prefix) = (shared_url(), fresh_prefix());
    let broker = connect(&url, &prefix).await;
    let (connection, channel) = raw(&url).await;
    let run = RunId::new();
    let (bad, good) = (job(&run, 1), job(&run, 2));
    let later = String::from_utf8(bad.encode())
        .unwrap()
        .replace("\"version\":1", "\"version\":99");
    let properties = |id: String| {
        BasicProperties::default()
            .with_type("job".into())
            .with_message_id(id.as_str().into())
    };
    publish_raw(&channel, &prefix, b"\xff{", BasicProperties::default()).await;
    publish_raw(&channel, &prefix, later.as_bytes(), properties(bad.id())).await;
    publish_raw(&channel, &prefix, b"", properties("no id".to_owned())).await;
    enqueue(&broker, std::slice::from_ref(&good)).await;

    let mut deliveries = broker.deliveries(1).await.unwrap();
    let delivery = next(&mut deliveries).await;
    assert_eq!(delivery.job, good);
    delivery.settle(Settlement::Done).await.unwrap();
    waiting(&broker, |waiting| {
        waiting
            == Waiting {
                ready: 0,
                retry: 0,
                dead: 3,
                workers: 1,
            }
    })
    .await;

    let events = history(&broker).await;
    let [Event::Job(seen), Event::Outcome(record)] = &events[..] else {
        panic!("{events:?}");
    };
    assert_eq!(*seen, good);
    assert_eq!(record.key(), bad.key());
    assert_eq!(record.outcome, Outcome::Failed(FaultKind::Poison));
    assert!(record.message.contains("99"), "{}", record.message);

    let letters: Vec<_> = broker.dead_letters().await.unwrap().collect().await;
    let ids: Vec<_> = letters
        .iter()
        .map(|letter| letter.as_ref().unwrap().id.clone())
        .collect();
    // A message without an id gets one of its payload's, the same at each look.
    let unnamed = DeadLetter::payload_id(b"\xff{");
    assert_eq!(ids, [unnamed, bad.id(), "no id".to_owned()]);
    let payloads = letters
        .iter()
        .map(|letter| &letter.as_ref().unwrap().payload[..]);
    assert!(payloads.eq([b"\xff{", later.as_bytes(), b""]));
    assert!(
        letters
            .iter()
            .all(|letter| letter.as_ref().unwrap().job.is_err())
    );
    connection.close(200, "".into()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_no_job_and_cannot_be_recorded_takes_no_others_place() {
    let (url, prefix) = (shared_url(), fresh_prefix());
    let mut options = options(&url, &prefix);
    options.patience = Duration::from_secs(2);
    let broker = AmqpBroker::connect(options).await.unwrap();
    let mut deliveries = broker.deliveries(1).await.unwrap();
    let (connection, channel) = raw(&url).await;
    let run = RunId::new();
    let (bad, good) = (job(&run, 1), job(&run, 2));
    // Nothing can be recorded through an exchange of another kind.
    let exchange = prefix.as_str();
    channel
        .exchange_delete(exchange.into(), Default::default())
        .await
        .unwrap();
    channel
        .exchange_declare(
            exchange.into(),
            lapin::ExchangeKind::Fanout,
            Default::default(),
            FieldTable::default(),
        )
        .await
        .unwrap();
    let queue = format!("{prefix}.jobs");
    let properties = BasicProperties::default().with_message_id(bad.id().as_str().into());
    for (body, properties) in [
        (b"{".to_vec(), properties),
        (good.encode(), BasicProperties::default()),
    ] {
        let options = BasicPublishOptions::default();
        let queue = queue.as_str().into();
        let publish = channel.basic_publish("".into(), queue, options, &body, properties);
        publish.await.unwrap().await.unwrap();
    }
    let delivery = next(&mut deliveries).await;
    assert_eq!(delivery.job, good);
    connection.close(200, "".into()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn headers_of_others_do_no_harm() {
    let (url, prefix) = (shared_url(), fresh_prefix());
    let broker = connect(&url, &prefix).await;
    let (connection, channel) = raw(&url).await;
    let run = RunId::new();
    for (n, value, expected) in [
        (0, AMQPValue::LongUInt(3), 3),
        (1, AMQPValue::ShortShortInt(2), 2),
        (2, AMQPValue::LongLongInt(-1), 0),
        (3, AMQPValue::LongString("many".into()), 0),
        (4, AMQPValue::LongLongInt(i64::MAX), u32::MAX),
    ] {
        let mut headers = FieldTable::default();
        headers.insert("attempt".into(), value.clone());
        headers.insert("x-death".into(), AMQPValue::LongString("never".into()));
        let properties = BasicProperties::default().with_headers(headers);
        publish_raw(&channel, &prefix, &job(&run, n).encode(), properties).await;
        let mut deliveries = broker.deliveries(1).await.unwrap();
        let delivery = next(&mut deliveries).await;
        assert_eq!(
            (delivery.attempt, delivery.waits),
            (expected, 0),
            "{value:?}"
        );
        delivery.settle(Settlement::Done).await.unwrap();
    }
    connection.close(200, "".into()).await.unwrap();
}

/// What strangers wrote into a message does not go on to the broker's dead-lettering.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dead_letters_have_none_of_their_senders_headers() {
    let (url, prefix) = (shared_url(), fresh_prefix());
    let broker = connect(&url, &prefix).await;
    let (connection, channel) = raw(&url).await;
    let numbers = [AMQPValue::LongInt(1), AMQPValue::LongInt(2)];
    for body in [b"no job".to_vec(), job(&RunId::new(), 1).encode()] {
        let mut headers = FieldTable::default();
        let array = AMQPValue::FieldArray(numbers.to_vec().into());
        headers.insert("x-death".into(), array);
        headers.insert("theirs".into(), AMQPValue::LongInt(1));
        let properties = BasicProperties::default().with_headers(headers);
        publish_raw(&channel, &prefix, &body, properties).await;
        let mut deliveries = broker.deliveries(1).await.unwrap();
        let working = async {
            while let Some(delivery) = deliveries.next().await {
                delivery.settle(Settlement::Dead).await.unwrap();
            }
        };
        let looking = async {
            loop {
                let options = BasicGetOptions { no_ack: true };
                let got = channel.basic_get(format!("{prefix}.dead").into(), options);
                if let Some(letter) = got.await.unwrap() {
                    return letter.delivery;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        let letter = tokio::select! {
            () = working => panic!("deliveries end with the broker"),
            letter = looking => letter,
        };
        assert_eq!(letter.data, body);
        let headers = letter.properties.headers().clone().unwrap();
        let names = headers.inner().keys().map(ToString::to_string);
        // The queue of dead letters adds its own.
        let names: Vec<_> = names.filter(|name| name != "x-delivery-count").collect();
        assert_eq!(names, ["attempt", "cause", "returns", "waits"]);
    }
    connection.close(200, "".into()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn retries_wait_as_long_as_they_should_side_by_side() {
    let broker = connect(&shared_url(), &fresh_prefix()).await;
    enqueue(&broker, &jobs(&RunId::new(), 0..3)).await;
    let mut deliveries = broker.deliveries(3).await.unwrap();
    // The longest first: it must not hold up the others.
    for (after, attempt) in [(4, 3), (2, 2), (1, 1)] {
        let delivery = next(&mut deliveries).await;
        let again = Settlement::Again {
            after: Duration::from_secs(after),
            attempt,
            waits: 7,
            returns: 0,
        };
        delivery.settle(again).await.unwrap();
    }
    let start = Instant::now();
    for (attempt, from, to) in [(1, 0.8, 2.0), (2, 1.7, 4.0), (3, 3.6, 8.0)] {
        let delivery = next(&mut deliveries).await;
        let seconds = start.elapsed().as_secs_f64();
        assert_eq!((delivery.attempt, delivery.waits), (attempt, 7));
        assert!(
            (from..to).contains(&seconds),
            "attempt {attempt} after {seconds} s"
        );
        delivery.settle(Settlement::Done).await.unwrap();
    }
    assert!(
        history(&broker)
            .await
            .iter()
            .all(|event| matches!(event, Event::Job(_)))
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_that_is_reset_in_a_start_is_made_again() {
    let (proxy, url) = proxied();
    for bytes in START {
        let prefix = fresh_prefix();
        let one = jobs(&RunId::new(), 0..1).remove(0);
        let recorded = outcome(&one, Outcome::Processed);
        proxy.cut_once_at(bytes);
        let broker = connect(&url, &prefix).await;
        let again = || proxy.cut_once_at(bytes);
        again();
        let lock = broker.producer_lock().await.unwrap();
        assert!(lock.is_some(), "{bytes:?}");
        again();
        assert_eq!(broker.waiting().await.unwrap(), Waiting::default());
        again();
        enqueue(&broker, std::slice::from_ref(&one)).await;
        again();
        let mut notices = broker.announcements().await.unwrap();
        again();
        let mut followed = broker.events(Position::Now).await.unwrap();
        again();
        broker.record(&recorded).await.unwrap();
        assert_eq!(event(&mut followed).await, recorded, "{bytes:?}");
        again();
        let replayed = history(&broker).await;
        assert!(replayed.contains(&Event::Job(one.clone())), "{bytes:?}");
        again();
        let mut deliveries = broker.deliveries(1).await.unwrap();
        again();
        assert_eq!(next(&mut deliveries).await.job, one, "{bytes:?}");
        again();
        let letters = broker.dead_letters().await.unwrap();
        assert_eq!(letters.count().await, 0, "{bytes:?}");
        proxy.flow();
        broker.probe().await.unwrap();
        // Notices are for those who listen: it attaches again when it is polled.
        let pause = host_pause(1);
        let announced = async {
            loop {
                broker.announce(&pause).await.unwrap();
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        };
        tokio::select! {
            heard = next(&mut notices) => assert_eq!(heard, pause, "{bytes:?}"),
            () = announced => {}
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_start_by_a_clock_that_is_ahead_of_the_brokers_is_read_all_the_same() {
    let (url, prefix) = (shared_url(), fresh_prefix());
    let mut options = options(&url, &prefix);
    options.call_limit = Duration::from_secs(2);
    let broker = AmqpBroker::connect(options).await.unwrap();
    let all = jobs(&RunId::new(), 0..2);
    enqueue(&broker, &all[..1]).await;
    let ahead = OffsetDateTime::now_utc() + Duration::from_secs(20 * 60);
    let history = broker.history(Position::Since(ahead)).await.unwrap();
    let replayed: Vec<_> = history.map(|entry| entry.unwrap().event).collect().await;
    assert_eq!(replayed, [Event::Job(all[0].clone())]);
    let mut events = broker.events(Position::Since(ahead)).await.unwrap();
    assert_eq!(event(&mut events).await, Event::Job(all[0].clone()));
    enqueue(&broker, &all[1..]).await;
    assert_eq!(event(&mut events).await, Event::Job(all[1].clone()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_that_a_policy_expires_says_so() {
    let node = Node::start();
    let (url, prefix) = (node.url(), fresh_prefix());
    let broker = connect(&url, &prefix).await;
    let mut events = broker.events(Position::Now).await.unwrap();
    let policy = r#"{"message-ttl":1000}"#;
    node.control(&["set_policy", "short", ".*", policy]);
    let job = jobs(&RunId::new(), 0..1).remove(0);
    enqueue(&broker, std::slice::from_ref(&job)).await;
    assert_eq!(event(&mut events).await, Event::Job(job.clone()));
    let dead = event(&mut events).await;
    let queue = format!("{prefix}.jobs");
    let cause = DeathCause::Expired(queue.clone());
    assert_eq!(dead, Event::Dead(DeadJob { job, cause }));
    let record = dead.into_outcome().unwrap();
    assert_eq!(record.outcome, Outcome::Failed(FaultKind::Infra));
    let says = format!("expired: a policy sets message-ttl on {queue}");
    assert!(record.message.starts_with(&says), "{}", record.message);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_follower_outlives_the_brokers_consumer_timeout() {
    let node = Node::start();
    let timeout = "application:set_env(rabbit, consumer_timeout, 5000), application:set_env(rabbit, channel_tick_interval, 500).";
    node.control(&["eval", timeout]);
    let (idle, slow) = (fresh_prefix(), fresh_prefix());
    let (idle, slow) = (
        connect(&node.url(), &idle).await,
        connect(&node.url(), &slow).await,
    );
    let all = jobs(&RunId::new(), 0..16);
    let mut waiting = idle.events(Position::Now).await.unwrap();
    enqueue(&idle, &all[..1]).await;
    event(&mut waiting).await;
    // Three periods: nothing more comes for one follower, and one record a second for the other.
    let nothing = tokio::time::timeout(Duration::from_secs(16), waiting.next());
    let trickle = async {
        let mut events = slow.events(Position::Now).await.unwrap();
        for one in &all {
            enqueue(&slow, std::slice::from_ref(one)).await;
            assert_eq!(event(&mut events).await, Event::Job(one.clone()));
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    };
    let (nothing, ()) = tokio::join!(nothing, trickle);
    assert!(nothing.is_err(), "{nothing:?}");
    let log = node.log();
    assert!(log.contains("accepting AMQP connection"), "{log}");
    for complaint in ["delivery acknowledgement", "PRECONDITION_FAILED"] {
        assert!(!log.contains(complaint), "{log}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_later_version_records_is_skipped() {
    let (url, prefix) = (shared_url(), fresh_prefix());
    let broker = connect(&url, &prefix).await;
    let (connection, channel) = raw(&url).await;
    let mut events = broker.events(Position::Now).await.unwrap();
    for kind in ["weather", "worker", "outcome"] {
        let properties = BasicProperties::default().with_type(kind.into());
        let options = BasicPublishOptions::default();
        let publish = channel.basic_publish(
            prefix.as_str().into(),
            "run".into(),
            options,
            b"[1]",
            properties,
        );
        publish.await.unwrap().await.unwrap();
    }
    let known = outcome(&job(&RunId::new(), 1), Outcome::Processed);
    broker.record(&known).await.unwrap();
    assert_eq!(event(&mut events).await, known);
    assert_eq!(history(&broker).await, [known]);
    connection.close(200, "".into()).await.unwrap();
}

/// What is logged on this thread, from INFO on.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<String>>>);

impl std::io::Write for Log {
    fn write(&mut self, line: &[u8]) -> std::io::Result<usize> {
        let text = String::from_utf8_lossy(line).into_owned();
        self.0.lock().unwrap().push(text);
        Ok(line.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Log {
    fn lines(&self) -> Vec<String> {
        self.0.lock().unwrap().clone()
    }
}

#[tokio::test]
async fn an_outage_is_logged_when_it_begins_and_when_it_ends() {
    let (proxy, url) = proxied();
    let log = Log::default();
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter("info,lapin=off")
        .with_ansi(false)
        .with_writer({
            let log = log.clone();
            move || log.clone()
        })
        .finish();
    let _guard = tracing::subscriber::set_default(subscriber);
    let broker = connect(&url, &fresh_prefix()).await;
    let lock = broker.producer_lock().await.unwrap().expect("free");
    let mut deliveries = broker.deliveries(1).await.unwrap();
    let mut notices = broker.announcements().await.unwrap();
    let mut events = broker.events(Position::Now).await.unwrap();
    let one = jobs(&RunId::new(), 0..1).remove(0);
    let recorded = outcome(&one, Outcome::Processed);
    assert!(log.lines().is_empty(), "{:?}", log.lines());

    proxy.refuse();
    let healed = async {
        tokio::time::sleep(Duration::from_secs(6)).await;
        proxy.flow();
    };
    let used = async {
        broker.record(&recorded).await.unwrap();
        enqueue(&broker, std::slice::from_ref(&one)).await;
    };
    let (_, (), delivery, seen) =
        tokio::join!(healed, used, next(&mut deliveries), event(&mut events));
    assert_eq!((delivery.job, seen), (one, recorded));
    let start = Instant::now();
    while !log
        .lines()
        .iter()
        .any(|line| line.contains("connected again after"))
    {
        assert!(start.elapsed() < PROMPTLY, "{:?}", log.lines());
        _ = tokio::time::timeout(Duration::from_millis(100), notices.next()).await;
    }
    let lines = log.lines();
    let host = proxy.address().to_string();
    assert_eq!(lines.len(), 2, "{lines:?}");
    assert!(
        lines[0].contains("WARN") && lines[0].contains(&host),
        "{lines:?}"
    );
    assert!(
        lines[1].contains("INFO") && lines[1].contains(&host),
        "{lines:?}"
    );
    assert!(!lock.lost.is_cancelled());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_queue_is_waited_for() {
    let node = Node::start();
    let (url, prefix) = (node.url(), fresh_prefix());
    let pattern = format!("^{prefix}\\.jobs$");
    let policy = r#"{"max-length":20}"#;
    node.control(&[
        "set_policy",
        "--apply-to",
        "queues",
        "small",
        &pattern,
        policy,
    ]);
    let broker = connect(&url, &prefix).await;
    // The limit is a soft one: what is on its way when it is reached still gets in.
    let all = jobs(&RunId::new(), 0..1500);
    let enqueued = broker.enqueue(stream::iter(all.clone()).boxed());
    let worked = async {
        waiting(&broker, |waiting| waiting.ready >= 20).await;
        let mut deliveries = broker.deliveries(10).await.unwrap();
        let mut seen = HashSet::new();
        while seen.len() < all.len() {
            let delivery = next(&mut deliveries).await;
            seen.insert(delivery.job.id());
            delivery.settle(Settlement::Done).await.unwrap();
        }
    };
    let (enqueued, ()) = tokio::join!(enqueued, worked);
    assert_eq!(enqueued.unwrap().jobs, 1500);

    // Nobody takes anything: that is said, not waited for, for ever.
    let mut options = options(&url, &prefix);
    options.patience = Duration::from_secs(2);
    let impatient = AmqpBroker::connect(options).await.unwrap();
    let fault = impatient
        .enqueue(stream::iter(all).boxed())
        .await
        .unwrap_err();
    assert_eq!(fault.kind, FaultKind::Infra);
    assert!(fault.message.contains("full"), "{fault}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_jobs_queue_that_goes_while_jobs_are_published_is_noticed() {
    let (url, prefix) = (shared_url(), fresh_prefix());
    let broker = connect(&url, &prefix).await;
    let (connection, channel) = raw(&url).await;
    let jobs = stream::iter(jobs(&RunId::new(), 0..10)).then(async |job| {
        if job.repo.name() == "name-5" {
            let queue = format!("{prefix}.jobs");
            let delete = channel.queue_delete(queue.as_str().into(), QueueDeleteOptions::default());
            delete.await.unwrap();
        }
        job
    });
    let fault = broker.enqueue(Box::pin(jobs)).await.unwrap_err();
    assert!(fault.message.contains("deleted"), "{fault}");
    connection.close(200, "".into()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ending_a_consumer_hands_back_what_it_did_not_take_without_counting() {
    let broker = connect(&shared_url(), &fresh_prefix()).await;
    enqueue(&broker, &jobs(&RunId::new(), 0..2)).await;
    for _ in 0..=DELIVERY_LIMIT {
        let mut deliveries = broker.deliveries(2).await.unwrap();
        let taken = next(&mut deliveries).await;
        drop(deliveries);
        // The one in hand can still be settled; the other one comes back by itself.
        let again = Settlement::Again {
            after: Duration::ZERO,
            attempt: 0,
            waits: 0,
            returns: 0,
        };
        taken.settle(again).await.unwrap();
        waiting(&broker, |waiting| waiting.ready == 2).await;
    }
    waiting(&broker, |waiting| {
        waiting
            == Waiting {
                ready: 2,
                retry: 0,
                dead: 0,
                workers: 0,
            }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_whose_connection_was_lost_comes_back_and_cannot_be_settled() {
    let again = Settlement::Again {
        after: Duration::ZERO,
        attempt: 1,
        waits: 0,
        returns: 0,
    };
    for settlement in [again, Settlement::Done, Settlement::Dead] {
        a_lost_job_cannot_be_settled(settlement).await;
    }
}

async fn a_lost_job_cannot_be_settled(settlement: Settlement) {
    let (proxy, url) = proxied();
    let broker = connect(&url, &fresh_prefix()).await;
    enqueue(&broker, &jobs(&RunId::new(), 0..1)).await;
    let mut deliveries = broker.deliveries(1).await.unwrap();
    let first = next(&mut deliveries).await;
    proxy.cut();
    let again = next(&mut deliveries).await;
    assert_eq!(again.job, first.job);
    let shown = format!("{again:?}");
    assert!(!shown.contains("guest"), "{shown}");
    let fault = first.settle(settlement).await.unwrap_err();
    assert_eq!(fault.kind, FaultKind::Infra);
    // Neither a second copy was made of it, nor a dead letter; and it is still on loan.
    let on_loan = Waiting {
        workers: 1,
        ..Default::default()
    };
    assert_eq!(broker.waiting().await.unwrap(), on_loan);
    again.settle(Settlement::Done).await.unwrap();
    assert_eq!(broker.waiting().await.unwrap(), on_loan);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_question_that_fails_takes_no_loan_back() {
    let (url, prefix) = (shared_url(), fresh_prefix());
    let broker = connect(&url, &prefix).await;
    enqueue(&broker, &jobs(&RunId::new(), 0..1)).await;
    let mut deliveries = broker.deliveries(1).await.unwrap();
    let delivery = next(&mut deliveries).await;
    let (connection, channel) = raw(&url).await;
    let queue = format!("{prefix}.retry.60s");
    channel
        .queue_delete(queue.as_str().into(), QueueDeleteOptions::default())
        .await
        .unwrap();
    let fault = broker.waiting().await.unwrap_err();
    assert!(fault.message.contains(&queue), "{fault}");
    delivery.settle(Settlement::Done).await.unwrap();
    broker.probe().await.unwrap();
    waiting(&broker, |waiting| waiting.workers == 1).await;
    connection.close(200, "".into()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_that_breaks_in_use_is_made_again_ever_more_slowly() {
    let (proxy, url) = proxied();
    let broker = connect(&url, &fresh_prefix()).await;
    let mut deliveries = broker.deliveries(1).await.unwrap();
    // It opens, and goes with the first answer to a consumer.
    proxy.cut_at(CONSUMING);
    proxy.cut();
    let before = proxy.connections();
    let cut = tokio::time::timeout(Duration::from_secs(8), deliveries.next()).await;
    assert!(cut.is_err());
    let made = proxy.connections() - before;
    assert!((2..=6).contains(&made), "{made} connections in 8 s");
    proxy.flow();
    enqueue(&broker, &jobs(&RunId::new(), 0..1)).await;
    next(&mut deliveries).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_lock_is_one_for_all_processes_and_can_be_lost() {
    let prefix = fresh_prefix();
    let (proxy, through) = proxied();
    let mut options = options(&through, &prefix);
    options.lock_grace = Duration::from_secs(2);
    let (one, other) = (
        AmqpBroker::connect(options).await.unwrap(),
        connect(&shared_url(), &prefix).await,
    );
    let lock = one.producer_lock().await.unwrap().expect("free");
    assert!(other.producer_lock().await.unwrap().is_none());

    // Cut off for a moment, it is taken again.
    let before = proxy.connections();
    proxy.cut();
    wait_until(|| proxy.connections() > before).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(!lock.lost.is_cancelled());
    assert!(other.producer_lock().await.unwrap().is_none());

    // Cut off for long, another gets it, and that is noticed.
    proxy.refuse();
    let others = taken(&other).await;
    proxy.flow();
    tokio::time::timeout(PROMPTLY, lock.lost.cancelled())
        .await
        .expect("noticed");
    drop(lock);
    assert!(one.producer_lock().await.unwrap().is_none());
    drop(others);
    taken(&one).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_lock_is_not_lost_to_its_own_lost_connection() {
    let prefix = fresh_prefix();
    let (proxy, through) = proxied();
    let one = connect(&through, &prefix).await;
    let lock = one.producer_lock().await.unwrap().expect("free");
    let before = proxy.connections();
    proxy.cut_clients();
    wait_until(|| proxy.connections() > before).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(!lock.lost.is_cancelled());
    // The broker notices, and gives it back to its owner.
    proxy.cut();
    tokio::time::sleep(Duration::from_secs(8)).await;
    assert!(!lock.lost.is_cancelled());
    let other = connect(&shared_url(), &prefix).await;
    assert!(other.producer_lock().await.unwrap().is_none());
}

async fn taken(broker: &AmqpBroker) -> common::broker::ProducerLock {
    let start = Instant::now();
    loop {
        if let Some(lock) = broker.producer_lock().await.unwrap() {
            return lock;
        }
        assert!(start.elapsed() < PROMPTLY, "the lock is not given back");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn wait_until(mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < PROMPTLY, "it never came true");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn prefixes_keep_fleets_apart() {
    let url = shared_url();
    let (one, other) = (
        connect(&url, &fresh_prefix()).await,
        connect(&url, &fresh_prefix()).await,
    );
    enqueue(&one, &jobs(&RunId::new(), 0..3)).await;
    let lock = one.producer_lock().await.unwrap();
    assert!(lock.is_some());
    assert_eq!(other.waiting().await.unwrap(), Waiting::default());
    assert_eq!(history(&other).await, []);
    assert!(other.producer_lock().await.unwrap().is_some());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refusal_is_immediate_and_shows_no_secret() {
    let url = shared_url();
    let address = url.rsplit_once('@').unwrap().1.to_owned();
    for (url, says) in [
        (
            format!("amqp://guest:s3cr3t-word@{address}"),
            ["ACCESS_REFUSED", "check user and password"],
        ),
        (
            format!("amqp://guest:guest@{address}/no-such-vhost"),
            ["no-such-vhost", "check the virtual host"],
        ),
    ] {
        let options = options(&url, "x");
        let start = Instant::now();
        let shown = format!("{options:?}");
        let fault = AmqpBroker::connect(options).await.unwrap_err();
        assert!(start.elapsed() < PROMPTLY / 2, "it waited");
        for says in says {
            assert!(fault.message.contains(says), "{fault}");
        }
        for text in [fault.message, shown] {
            assert!(
                !text.contains("s3cr3t") && !text.contains("guest"),
                "{text}"
            );
        }
    }
    let broker = connect(&url, &fresh_prefix()).await;
    let shown = format!("{broker:?}");
    assert!(!shown.contains("guest"), "{shown}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn queues_of_another_shape_are_refused_with_advice() {
    let (url, prefix) = (shared_url(), fresh_prefix());
    let (connection, channel) = raw(&url).await;
    let name = format!("{prefix}.jobs");
    let durable = lapin::options::QueueDeclareOptions {
        durable: true,
        ..Default::default()
    };
    channel
        .queue_declare(name.as_str().into(), durable, FieldTable::default())
        .await
        .unwrap();
    let fault = AmqpBroker::connect(options(&url, &prefix))
        .await
        .unwrap_err();
    assert!(
        fault.message.contains(&name) && fault.message.contains("--queue-prefix"),
        "{fault}"
    );
    connection.close(200, "".into()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broker_that_is_away_is_waited_for_then_reported() {
    let nobody = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = nobody.local_addr().unwrap();
    drop(nobody);
    let config = |url: String, prefix: &str| BrokerConfig {
        broker_url: Some(common::broker::config::Secret(url)),
        queue_prefix: prefix.to_owned(),
    };
    let patience = Duration::from_secs(1);
    let away = config(format!("amqp://me:s3cr3t-word@{address}"), "x");
    let start = Instant::now();
    let error = away.connect(patience).await.unwrap_err();
    assert!(start.elapsed() >= patience);
    assert_eq!(error.code, exit::UNAVAILABLE);
    for says in [&*address.to_string(), "nobody listens", "--broker-url"] {
        assert!(error.message.contains(says), "{error}");
    }
    assert!(
        !format!("{error:?} {away:?}").contains("s3cr3t"),
        "{error:?} {away:?}"
    );

    for (url, prefix) in [
        ("amqp://me:s3cr3t-word", "x"),
        ("http://me:s3cr3t-word@h", "x"),
        ("amqp://h", "a b"),
    ] {
        let error = config(url.to_owned(), prefix)
            .connect(patience)
            .await
            .unwrap_err();
        assert_eq!(error.code, exit::USAGE, "{error}");
        assert!(!error.message.contains("s3cr3t"), "{error}");
    }
    let none = BrokerConfig {
        broker_url: None,
        queue_prefix: String::new(),
    };
    assert!(none.connect(patience).await.unwrap().is_none());
}
