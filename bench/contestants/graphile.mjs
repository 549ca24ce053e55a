// graphile-worker: one job at once by default; 24, with a local queue of 500, at best.
import { Logger, makeWorkerUtils, run } from 'graphile-worker'
import { main, mark, stopped, URL } from './common.mjs'

const logger = new Logger(() => (level, message) => level === 'error' && console.error(message))
const BEST = {
  concurrentJobs: 24, localQueue: { size: 500 }, completeJobBatchDelay: 0, failJobBatchDelay: 0,
}
let utils
const maxPoolSize = 32
const open = async () => (utils ??= await makeWorkerUtils({ connectionString: URL, maxPoolSize, logger }))

await main({
  setup: async () => (await open()).migrate(),
  fill: async (n) =>
    (await open()).addJobs(Array.from({ length: n }, () => ({ identifier: 'noop', payload: {} }))),
  work: async (variant) => {
    const runner = await run({
      connectionString: URL, logger, noHandleSignals: true, taskList: { noop: () => mark() },
      ...(variant === 'best' ? { preset: { worker: BEST } } : {}),
    })
    await stopped()
    await runner.stop()
  },
  enqueue: async () => (await open()).addJob('noop', {}),
  close: async () => utils?.release(),
})
