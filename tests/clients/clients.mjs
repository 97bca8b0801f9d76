// Runs the npm clients against a server, and prints their answers as one JSON object.
import { constructLlmApi } from "@continuedev/openai-adapters";
import { Ollama } from "ollama";
import OpenAI from "openai";

const [url, prefix, suffix] = process.argv.slice(2);
const answers = {};
const signal = new AbortController().signal;

const openai = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
const request = { model: "any", prompt: prefix, suffix, max_tokens: 8, temperature: 0 };
answers.openai = (await openai.completions.create(request)).choices[0].text;
answers.openai_stream = "";
for await (const chunk of await openai.completions.create({ ...request, stream: true, stream_options: { include_usage: true } })) {
  answers.openai_stream += chunk.choices[0]?.text ?? "";
}
const messages = [{ role: "user", content: "Say hi." }];
answers.openai_chat = (await openai.chat.completions.create({ model: "any", messages, max_tokens: 8, temperature: 0 })).choices[0].message.content;
answers.openai_models = (await openai.models.list()).data[0].id;

const ollama = new Ollama({ host: url });
const options = { num_predict: 8, temperature: 0 };
answers.ollama = (await ollama.generate({ model: "any", prompt: prefix, suffix, options })).response;
answers.ollama_stream = "";
for await (const part of await ollama.generate({ model: "any", prompt: prefix, suffix, options, stream: true })) {
  answers.ollama_stream += part.response;
}
answers.ollama_chat = (await ollama.chat({ model: "any", messages, options })).message.content;
answers.ollama_template = (await ollama.show({ model: "any" })).template;

for (const provider of ["openai", "mistral"]) {
  const api = constructLlmApi({ provider, apiBase: `${url}/v1/`, apiKey: "none" });
  answers[`continue_${provider}`] = "";
  for await (const chunk of api.fimStream({ model: "any", prompt: prefix, suffix, max_tokens: 8, temperature: 0, stream: true }, signal)) {
    answers[`continue_${provider}`] += chunk.choices[0].delta.content;
  }
}
const fim = `<|fim_prefix|>${prefix}<|fim_suffix|>${suffix}<|fim_middle|>`;
answers.continue_raw = "";
const api = constructLlmApi({ provider: "openai", apiBase: `${url}/v1/`, apiKey: "none" });
const stop = ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|file_separator|>", "<end_of_turn>", "<eos>"];
for await (const chunk of api.completionStream({ model: "codegemma", prompt: fim, max_tokens: 8, temperature: 0, stop, stream: true }, signal)) {
  answers.continue_raw += chunk.choices[0]?.text ?? "";
}
console.log(JSON.stringify(answers));
