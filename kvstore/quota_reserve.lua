-- Take one request and ARGV[3] tokens out of a sliding minute, or say how long to wait.
-- KEYS[1]: hash, r<second> and t<second> -> requests and tokens of that second of the server's clock.
-- ARGV[1], ARGV[2]: requests and tokens a minute, 0 for no limit.
-- Answers {1 or 0, requests left, tokens left, s until requests are whole, s until tokens are, s to wait, second}.
local window_s = 60
local now = tonumber(redis.call('TIME')[1])
local limits = {r = tonumber(ARGV[1]), t = tonumber(ARGV[2])}
local wanted = {r = 1, t = tonumber(ARGV[3])}
local buckets, used, newest = {r = {}, t = {}}, {r = 0, t = 0}, {r = 0, t = 0}

local fields = redis.call('HGETALL', KEYS[1])
for i = 1, #fields, 2 do
  local kind, second = string.sub(fields[i], 1, 1), tonumber(string.sub(fields[i], 2))
  if second <= now - window_s then
    redis.call('HDEL', KEYS[1], fields[i])
  else
    local count = tonumber(fields[i + 1])
    buckets[kind][#buckets[kind] + 1] = {second, count}
    used[kind] = used[kind] + count
    newest[kind] = math.max(newest[kind], second)
  end
end

-- Seconds until so much has left the window that `kind` fits.
local function wait_s(kind)
  local excess = used[kind] + wanted[kind] - limits[kind]
  if limits[kind] == 0 or excess <= 0 then
    return 0
  end
  table.sort(buckets[kind], function(a, b) return a[1] < b[1] end)
  for _, bucket in ipairs(buckets[kind]) do
    excess = excess - bucket[2]
    if excess <= 0 then
      return bucket[1] + window_s - now
    end
  end
  return window_s
end

local wait = math.max(wait_s('r'), wait_s('t'))
if wait == 0 then
  for kind, count in pairs(wanted) do
    redis.call('HINCRBY', KEYS[1], kind .. now, count)
    used[kind] = used[kind] + count
    newest[kind] = now
  end
  redis.call('EXPIRE', KEYS[1], window_s + 1)
end

local function left(kind)
  return math.max(0, limits[kind] - used[kind])
end
local function reset_s(kind)
  return used[kind] > 0 and newest[kind] + window_s - now or 0
end
return {wait == 0 and 1 or 0, left('r'), left('t'), reset_s('r'), reset_s('t'), wait, now}
