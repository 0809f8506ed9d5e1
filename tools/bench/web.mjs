// Run models with onnxruntime-web in Node (WASM, one thread): node --no-liftoff web.mjs PACKAGE
//
// PACKAGE is the folder of onnxruntime-web. Each line of the input names a job, a JSON file: {groups: [{models: [paths],
// feeds: {name: {type, dims, file}}}], seconds, out: where the results go}. The models of a group run in turn, each for
// so many seconds and three times at least (not at all for 0 seconds). For each model the results have either an error, or
// the milliseconds that loading took, those of each run, and the outputs of the first run, in base64. A line is printed for
// each job that is done. --no-liftoff has V8 optimize all code at once, as it does with what has run for a while.
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { createInterface } from "node:readline";
import { pathToFileURL } from "node:url";

const ARRAYS = {
  float32: Float32Array, int64: BigInt64Array, int32: Int32Array, int8: Int8Array, uint8: Uint8Array, bool: Uint8Array,
};
const LEAST_RUNS = 3;
const ort = await import(pathToFileURL(join(process.argv[2], "dist", "ort.node.min.mjs")));
ort.env.wasm.numThreads = 1;
ort.env.logLevel = "error";

function tensor({ type, dims, file }) {
  const bytes = readFileSync(file);
  return new ort.Tensor(type, new ARRAYS[type](new Uint8Array(bytes).buffer), dims);
}

function packed({ type, dims, data }) {
  return { type, dims, data: Buffer.from(data.buffer, data.byteOffset, data.byteLength).toString("base64") };
}

async function load(path, feeds) {
  const start = performance.now();
  try {
    const session = await ort.InferenceSession.create(path, { executionProviders: ["wasm"], logSeverityLevel: 4 });
    const load = performance.now() - start;
    const outputs = Object.entries(await session.run(feeds)).map(([name, made]) => [name, packed(made)]);
    return { session, load, times: [], outputs: Object.fromEntries(outputs) };
  } catch (error) {
    return { error: String(error.message ?? error) };
  }
}

async function runInTurn(loaded, feeds, seconds) {
  const begun = performance.now();
  const wanted = seconds * 1000 * loaded.length;
  while (wanted && (performance.now() - begun < wanted || loaded[0].times.length < LEAST_RUNS)) {
    for (const one of loaded) {
      const start = performance.now();
      await one.session.run(feeds);
      one.times.push(performance.now() - start);
    }
  }
}

async function work({ groups, seconds, out }) {
  const results = [];
  for (const { models, feeds: files } of groups) {
    const feeds = Object.fromEntries(Object.entries(files).map(([name, file]) => [name, tensor(file)]));
    const loaded = [];
    for (const path of models) loaded.push(await load(path, feeds));
    await runInTurn(loaded.filter((one) => one.session), feeds, seconds);
    for (const { session } of loaded) await session?.release();
    results.push(loaded.map(({ session, ...rest }) => rest));
  }
  writeFileSync(out, JSON.stringify(results));
}

for await (const line of createInterface({ input: process.stdin })) {
  await work(JSON.parse(readFileSync(line)));
  console.log("done");
}
process.exit(0);
