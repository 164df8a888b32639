-- Live writers as {worker id, incarnation, sequence, remaining ms, ...}; forgets those whose lease has ended.
local writers = KEYS[1]

local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)

local listing = {}
local states = redis.call('HGETALL', writers)
for i = 1, #states, 2 do
  local incarnation, sequence, ends_at = string.match(states[i + 1], '^(%S+) (%d+) (%d+)$')
  local remaining_ms = tonumber(ends_at) - now_ms
  if remaining_ms <= 0 then
    redis.call('HDEL', writers, states[i])
  else
    for _, value in ipairs({ states[i], incarnation, tonumber(sequence), remaining_ms }) do
      listing[#listing + 1] = value
    end
  end
end
return listing
