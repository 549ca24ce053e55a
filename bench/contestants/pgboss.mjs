// pg-boss: one job a fetch, polled every 2 s, by default; LISTEN/NOTIFY and batches of 500 at best.
import { PgBoss } from 'pg-boss'
import { main, mark, stopped, URL } from './common.mjs'

const best = process.env.BENCH_VARIANT === 'best'
const max = 32 // connections, as many as the most clients that enqueue; its default is 10
const boss = new PgBoss({ connectionString: URL, max, ...(best ? { useListenNotify: true } : {}) })
boss.on('error', console.error)

await main({
  setup: async () => {
    await boss.start()
    await boss.createQueue('noop', best ? { notify: true } : {})
  },
  fill: async (n) => {
    await boss.start()
    for (let i = 0; i < n; i += 5000)
      await boss.insert('noop', Array.from({ length: Math.min(5000, n - i) }, () => ({ data: {} })))
  },
  work: async () => {
    await boss.start()
    const options = best ? { batchSize: 500, burstWhenBatchFull: true, localConcurrency: 3 } : {}
    await boss.work('noop', options, async (jobs) => jobs.forEach(() => mark()))
    await stopped()
  },
  enqueue: async () => {
    if (!boss.__started) { await boss.start(); boss.__started = true }
    await boss.send('noop', {})
  },
  close: () => boss.stop({ graceful: false }),
})
