-- Orthanc script for dicomnode: a study that is stable and holds a PET goes to the node, with its CT; the derived
-- series that the node sends back is not forwarded again. For Orthanc 1.10 and later, without plug-ins.
--
-- NODE is the node's name in DicomModalities (see orthanc.json beside this file).
-- What was forwarded is written into the metadata of each series, so that a restart forwards nothing twice; a series
-- that has grown since is forwarded again as a whole, and the node keeps each instance once. What could not be sent is
-- tried again whenever another study becomes stable; the node's own nightly query (schedule.retrieve_at) finds the rest.

local NODE = 'NBDNODE'
local MODALITIES = { PT = true, CT = true }
local FORWARDED = '4711'  -- user-defined metadata: how many instances of the series were sent

local sending = {}  -- job -> { series -> number of instances }
local failed = {}   -- study -> true: its forwarding failed since Orthanc was started

local function get(path)
   return ParseJson(RestApiGet(path))
end

-- Whether the node itself sent it: then it is a result, or belongs to one.
local function fromNode(instance, aet)
   return get('/instances/' .. instance .. '/metadata?expand')['RemoteAET'] == aet
end

-- The PET and CT series of a study that the node has not sent, and whether a PET among them is new or has grown.
local function toForward(study)
   local aet = get('/modalities/' .. NODE .. '/configuration')['AET']
   local found, news = {}, false
   for _, series in ipairs(get('/studies/' .. study .. '/series')) do
      local modality = series['MainDicomTags']['Modality']
      if MODALITIES[modality] and not fromNode(series['Instances'][1], aet) then
         local count = #series['Instances']
         local before = get('/series/' .. series['ID'] .. '/metadata?expand')[FORWARDED]
         if before ~= tostring(count) then
            found[series['ID']] = count
         end
         if modality == 'PT' then
            news = news or before ~= tostring(count)
            found.pet = true
         end
      end
   end
   local pet = found.pet
   found.pet = nil
   -- A CT that comes after its PET is news, too: the node waits for it for a while.
   return found, news or (pet and next(found) ~= nil)
end

local function forward(study)
   local series, wanted = toForward(study)
   if not wanted then
      print('dicomnode: nothing to forward of study ' .. study)
      return
   end
   local resources = {}
   for id, _ in pairs(series) do
      table.insert(resources, id)
   end
   -- Asynchronous: a script that waits would hold up what Orthanc receives meanwhile.
   local answer = RestApiPost('/modalities/' .. NODE .. '/store',
                              DumpJson({ Resources = resources, Asynchronous = true }, true))
   local job = ParseJson(answer)['ID']
   sending[job] = { study = study, series = series }
   print('dicomnode: ' .. #resources .. ' series of study ' .. study .. ' go to ' .. NODE .. ', job ' .. job)
end

function OnStableStudy(study, tags, metadata)
   forward(study)
   local again = failed
   failed = {}
   for other, _ in pairs(again) do
      if other ~= study then
         forward(other)
      end
   end
end

function OnJobSuccess(job)
   local sent = sending[job]
   if sent == nil then
      return  -- not one of ours
   end
   sending[job] = nil
   for id, count in pairs(sent.series) do
      RestApiPut('/series/' .. id .. '/metadata/' .. FORWARDED, tostring(count))
   end
   print('dicomnode: study ' .. sent.study .. ' has been forwarded')
end

function OnJobFailure(job)
   local sent = sending[job]
   if sent == nil then
      return
   end
   sending[job] = nil
   failed[sent.study] = true
   print('dicomnode: study ' .. sent.study .. ' could not be forwarded; it is tried again with the next study')
end
