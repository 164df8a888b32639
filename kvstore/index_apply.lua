-- Apply one event of one worker and tell the mirrors.
-- Returns 1 applied (or applied before), 0 start over with a reset, -1 another incarnation has taken over.
-- Hash lists are concatenated hashes of hash_bytes each. An event without hashes only lengthens the lease.
-- The arguments from the tenth on are, for the first tier, the second, and so on: the blocks that are there
-- now, and the place of each in the order of the worker's blocks (block_order.py), concatenated too.
local writers, events, blocks = KEYS[1], KEYS[2], KEYS[3]
local worker_id, incarnation, sequence = ARGV[1], ARGV[2], tonumber(ARGV[3])
local is_reset, takes_over, lease_ms = ARGV[4] == '1', ARGV[5] == '1', tonumber(ARGV[6])
local hash_bytes, max_events, removed = tonumber(ARGV[7]), ARGV[8], ARGV[9]
local placed = {}
for index = 10, #ARGV, 2 do
  placed[#placed + 1] = { hashes = ARGV[index], places = ARGV[index + 1] }
end
local batch = 512 -- arguments of one call inside a script are limited

local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)

local function writer(id)
  local state = redis.call('HGET', writers, id)
  if not state then
    return nil
  end
  local held_by, last, ends_at = string.match(state, '^(%S+) (%d+) (%d+)$')
  if tonumber(ends_at) <= now_ms then
    return nil
  end
  return held_by, tonumber(last)
end

local held_by, last = writer(worker_id)
if held_by and held_by ~= incarnation and not takes_over then
  return -1
end

local is_new = is_reset or removed ~= ''
for _, there in ipairs(placed) do
  is_new = is_new or there.hashes ~= ''
end
if held_by == incarnation and is_new and last == sequence then
  is_new = false -- the answer to the first attempt was lost
elseif not is_reset then
  local expected = is_new and sequence - 1 or sequence
  if held_by ~= incarnation or last ~= expected then
    return 0
  end
end

local function each_batch(command, hashes, value_of)
  local arguments = {}
  local count = #hashes / hash_bytes
  for index = 1, count do
    arguments[#arguments + 1] = string.sub(hashes, (index - 1) * hash_bytes + 1, index * hash_bytes)
    arguments[#arguments + 1] = value_of and value_of(index, count)
    if #arguments >= batch or index == count then
      redis.call(command, blocks, unpack(arguments))
      arguments = {}
    end
  end
end

if is_new then
  local event = { 'w', worker_id, 'i', incarnation, 'n', sequence, 'r', is_reset and '1' or '0', 'x', removed }
  if is_reset then
    redis.call('UNLINK', blocks)
  end
  each_batch('HDEL', removed)
  for number, there in ipairs(placed) do
    local tier = number - 1
    each_batch('HSET', there.hashes, function(index, count)
      local place_bytes = #there.places / count
      return tier .. string.sub(there.places, (index - 1) * place_bytes + 1, index * place_bytes)
    end)
    event[#event + 1] = tier
    event[#event + 1] = there.hashes
  end
  redis.call('XADD', events, 'MAXLEN', '~', max_events, '*', unpack(event))
end

local ends_at = now_ms + lease_ms
redis.call('HSET', writers, worker_id, incarnation .. ' ' .. sequence .. ' ' .. ends_at)
redis.call('PEXPIRE', blocks, lease_ms)
for _, key in ipairs({ writers, events }) do
  if redis.call('PTTL', key) < lease_ms then
    redis.call('PEXPIRE', key, lease_ms)
  end
end
return 1
