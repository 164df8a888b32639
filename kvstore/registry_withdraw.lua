-- Remove a worker; an empty incarnation removes whichever is there.
local records, leases, changes = KEYS[1], KEYS[2], KEYS[3]
local worker_id, incarnation = ARGV[1], ARGV[2]

local record = redis.call('HGET', records, worker_id)
if not record then
  return 0
end
if incarnation ~= '' and cjson.decode(record).incarnation ~= incarnation then
  return 0
end
redis.call('HDEL', records, worker_id)
redis.call('ZREM', leases, worker_id)
redis.call('PUBLISH', changes, 'withdrawn ' .. worker_id)
return 1
