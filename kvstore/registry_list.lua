-- Live workers as {record, remaining ms, ...}; forgets those whose lease has ended.
local records, leases = KEYS[1], KEYS[2]

local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)

local ended = redis.call('ZRANGE', leases, '-inf', now_ms, 'BYSCORE')
for _, worker_id in ipairs(ended) do
  redis.call('ZREM', leases, worker_id)
  redis.call('HDEL', records, worker_id)
end

local listing = {}
local held = redis.call('ZRANGE', leases, 0, -1, 'WITHSCORES')
for i = 1, #held, 2 do
  listing[i] = redis.call('HGET', records, held[i])
  listing[i + 1] = tonumber(held[i + 1]) - now_ms
end
return listing
