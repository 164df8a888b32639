-- Announce or renew a worker: 1 done, 0 refused because a newer incarnation holds the lease.
-- Durations in milliseconds, server time.
local records, leases, changes = KEYS[1], KEYS[2], KEYS[3]
local worker_id, incarnation, record = ARGV[1], ARGV[2], ARGV[3]
local lease_ms, takes_over, tells_readers = tonumber(ARGV[4]), ARGV[5] == '1', ARGV[6] == '1'

local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)

local ends_at = tonumber(redis.call('ZSCORE', leases, worker_id) or '0')
local is_held = ends_at > now_ms
if is_held and not takes_over then
  local held = cjson.decode(redis.call('HGET', records, worker_id))
  if held.incarnation ~= incarnation then
    return 0
  end
end

redis.call('HSET', records, worker_id, record)
redis.call('ZADD', leases, now_ms + lease_ms, worker_id)
local last = redis.call('ZRANGE', leases, -1, -1, 'WITHSCORES')
redis.call('PEXPIREAT', records, last[2])
redis.call('PEXPIREAT', leases, last[2])
if tells_readers or not is_held then
  redis.call('PUBLISH', changes, 'announced ' .. worker_id)
end
return 1
