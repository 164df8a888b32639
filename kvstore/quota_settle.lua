-- Correct what quota_reserve.lua took at second ARGV[1]: ARGV[2] requests and ARGV[3] tokens more (or fewer).
-- What was too much goes back where it was taken; what is missing counts now, so that every token counts once.
local window_s = 60
local now = tonumber(redis.call('TIME')[1])
local taken_at = tonumber(ARGV[1])
for kind, change in pairs({r = tonumber(ARGV[2]), t = tonumber(ARGV[3])}) do
  if change > 0 then
    redis.call('HINCRBY', KEYS[1], kind .. now, change)
    redis.call('EXPIRE', KEYS[1], window_s + 1)
  elseif change < 0 and taken_at > now - window_s and redis.call('HEXISTS', KEYS[1], kind .. taken_at) == 1 then
    redis.call('HINCRBY', KEYS[1], kind .. taken_at, change)
  end
end
return 1
