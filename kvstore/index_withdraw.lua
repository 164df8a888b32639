-- A worker leaves: its blocks go and mirrors drop it. Nothing happens when another incarnation has taken over.
local writers, events, blocks = KEYS[1], KEYS[2], KEYS[3]
local worker_id, incarnation, max_events = ARGV[1], ARGV[2], ARGV[3]

redis.call('UNLINK', blocks)
local state = redis.call('HGET', writers, worker_id)
if not state or string.match(state, '^%S+') ~= incarnation then
  return 0
end
redis.call('HDEL', writers, worker_id)
redis.call('XADD', events, 'MAXLEN', '~', max_events, '*', 'w', worker_id, 'i', incarnation, 'd', '1')
local lease_ms = redis.call('PTTL', writers)
if lease_ms > 0 and redis.call('PTTL', events) < 0 then
  redis.call('PEXPIRE', events, lease_ms)
end
return 1
