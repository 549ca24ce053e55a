// The same commands as common.py, for Node.
import { createInterface } from 'node:readline'

const TELL = process.env.BENCH_TELL !== undefined
const QUIET = 100_000_000n // nanoseconds
let last = 0n

export const URL = process.env.DATABASE_URL

export function mark() {
  const now = process.hrtime.bigint()
  if (TELL) console.log('start', String(now))
  else if (now > last + QUIET) console.log('first', String(now))
  last = now
}

export const stopped = () => new Promise((resolve) => process.once('SIGTERM', resolve))

async function flood(one, clients, seconds) {
  const started = performance.now()
  let done = 0
  const client = async () => {
    for (; performance.now() < started + seconds * 1e3; done++) await one()
  }
  await Promise.all(Array.from({ length: clients }, client))
  console.log((done / (performance.now() - started)) * 1e3)
}

async function produce(one) {
  for await (const line of createInterface({ input: process.stdin })) {
    await one()
    console.log('committed', String(process.hrtime.bigint()))
  }
}

export async function main({ setup, fill, work, enqueue, close }) {
  const [command, first, second] = process.argv.slice(2)
  if (command === 'setup') await setup()
  else if (command === 'fill') await fill(Number(first))
  else if (command === 'work') await work(first)
  else if (command === 'produce') await produce(enqueue)
  else if (command === 'flood') await flood(enqueue, Number(first), Number(second))
  if (close) await close()
  process.exit(0)
}
