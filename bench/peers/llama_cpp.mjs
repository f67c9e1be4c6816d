// llama.cpp as a worker, through the prebuilt binaries of node-llama-cpp: one JSON request a line
// in, one JSON reply a line out, like bench/worker.py. Greedy, batch 1, the GGUF file's own weights.
import {createRequire} from "node:module";
import {createInterface} from "node:readline";
import path from "node:path";
import {pathToFileURL} from "node:url";

const folder = process.env.NODE_LLAMA_CPP ?? process.cwd();
const require = createRequire(path.join(path.resolve(folder), "package.json"));
const {getLlama, LlamaLogLevel} = await import(
    pathToFileURL(require.resolve("node-llama-cpp")).href
);

let model, context, sequence, contextSize;

const handlers = {
    async load({gguf, size}) {
        contextSize = size;
        // maxThreads 0: a context runs on exactly the threads it asks for
        const llama = await getLlama({
            build: "never", gpu: false, maxThreads: 0, logLevel: LlamaLogLevel.error,
        });
        model = await llama.loadModel({modelPath: gguf});
        return {release: llama.llamaCppRelease?.release ?? null};
    },
    async threads({count}) {
        if (context != null) await context.dispose();
        context = await model.createContext({contextSize, batchSize: 512, threads: count});
        sequence = context.getSequence();
        return {threads: context.currentThreads};
    },
    async generate({prompts, new: count}) {
        if (prompts.length !== 1) throw new Error("batch 1 only");
        await sequence.clearHistory();
        const tokens = [];
        let prefilled;
        const options = {temperature: 0, yieldEogToken: true};
        for await (const token of sequence.evaluate(prompts[0], options)) {
            tokens.push(token);
            if (tokens.length === 1) prefilled = performance.now();
            if (tokens.length === count) break;
        }
        const seconds = (performance.now() - prefilled) / 1e3;
        if (tokens.length !== count) throw new Error(`${tokens.length} tokens instead of ${count}`);
        return {
            seconds, tokens_per_s: (count - 1) / seconds, ms_per_step: 1e3 * seconds / (count - 1),
            tokens: [tokens],
        };
    },
    async prefill({prompt}) {
        await sequence.clearHistory();
        const start = performance.now();
        await sequence.evaluateWithoutGeneratingNewTokens(prompt);
        const seconds = (performance.now() - start) / 1e3;
        return {seconds, tokens_per_s: prompt.length / seconds};
    },
};

for await (const line of createInterface({input: process.stdin})) {
    const request = JSON.parse(line);
    let reply;
    try {
        reply = {result: (await handlers[request.call](request.arguments)) ?? null};
    } catch (error) {
        reply = {error: String(error.message ?? error).replace(/\s+/g, " ")};
    }
    process.stdout.write(JSON.stringify(reply) + "\n");
}
process.exit(0);
