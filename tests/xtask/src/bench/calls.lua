-- For wrk: posts its first argument, expects its second in every answer, and tells percentiles in microseconds.

local threads = {}
wrong = 0

function setup(thread)
  table.insert(threads, thread)
end

function init(args)
  wrk.method = "POST"
  wrk.body = args[1]
  wrk.headers["Content-Type"] = "application/json"
  wrk.headers["Accept"] = "application/json, text/event-stream"
  expected = args[2]
end

function response(status, headers, body)
  if status ~= 200 or not string.find(body, expected, 1, true) then
    wrong = wrong + 1
  end
end

function done(summary, latency)
  local errors = summary.errors
  local failed = errors.connect + errors.read + errors.write + errors.status + errors.timeout
  for _, thread in ipairs(threads) do
    failed = failed + thread:get("wrong")
  end
  local form = 'CALLS {"p50_us":%.1f,"p95_us":%.1f,"calls":%d,"failed":%d}\n'
  io.write(string.format(form, latency:percentile(50), latency:percentile(95), summary.requests, failed))
end
